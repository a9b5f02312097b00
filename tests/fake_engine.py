"""An engine whose actors do what a test says, on a clock of its own."""

from nopad.embedding.actors.engine import Beat, Died, Finished, Loaded, Place, Placed, Raised, Ready

ROWS = 64
NOTHING_SKIPPED = {shard: {} for shard in range(6)}


class KilledError(Exception):
    """The process ends over its task."""


class UnreachableError(Exception):
    """An input cannot be reached."""


class PreemptedError(Exception):
    """Its machine is taken away."""


class LostMachineError(Exception):
    """Its machine fails."""


class HangError(Exception):
    """The task makes no progress."""


class FakeEngine:
    """Actors on nodes in turn. `does` is called with node and task, and returns how many rows failed, or raises.

    A task takes no time, on the nodes of `slow` so many seconds. An actor `is_ready` for another at once, or never.
    """

    def __init__(
        self,
        does,
        nodes=("a",),
        loads=lambda node: {"record": "same"},
        starts=lambda number: True,
        slow=None,
        is_ready=False,
    ):
        self.is_ready = is_ready
        self.in_hand: dict[int, list] = {}
        self.together = []
        self.does, self.nodes, self.loads, self.starts, self.slow = does, nodes, loads, starts, slow or {}
        self.later = []
        self.now = 0.0
        self.number = 0
        self.node_of: dict[int, str] = {}
        self.hanging: set[int] = set()
        self.aside: list[str] = []
        self.events = []
        self.log = []
        self.killed = []
        self.loaded_by = []

    def start(self):
        self.number += 1
        nodes = [node for node in self.nodes if node not in self.aside]
        if not nodes or not self.starts(self.number):
            return self.number
        node = nodes[self.number % len(nodes)]
        self.node_of[self.number] = node
        self.events.append(Placed(self.number, Place(node, f"host-{node}", self.number)))
        return self.number

    def load(self, actor, program, begun):
        self.loaded_by.append((actor, begun))
        try:
            self.events.append(Loaded(actor, self.loads(self.node_of[actor])))
        except Exception as error:
            self.events.append(Raised(actor, error))

    def send(self, actor, task):
        node = self.node_of[actor]
        self.log.append((node, task))
        self.in_hand.setdefault(actor, []).append(task)
        self.together.append([each.shard for each in self.in_hand[actor]])
        if actor in self.hanging:
            return
        if self.is_ready:
            self.events.append(Ready(actor))
        try:
            failed = self.does(node, task)
        except KilledError:
            self.events.append(Died(actor, "it was ended by SIGSEGV"))
        except PreemptedError:
            self.events.append(Died(actor, "preempted", preempted=True))
        except LostMachineError:
            self.events.append(Died(actor, "its node has died", with_node=True))
        except HangError:
            self.hanging.add(actor)
        except UnreachableError as error:
            unmade = Finished(actor, {"rows": 0, "num_failed": 0, "unmade": str(error)})
            self.later.append((self.now, unmade))
        except Exception as error:
            self.events.append(Raised(actor, error))
        else:
            finished = Finished(actor, {"rows": ROWS, "num_failed": failed + len(task.skipped)})
            self.later.append((self.now + self.slow.get(node, 0.0), finished))

    def kill(self, actor):
        assert actor not in self.killed
        self.killed.append(actor)
        self.hanging.discard(actor)

    def wait(self, seconds):
        self.now += 1.0
        assert self.now < 5e3, "the job does not end"
        done = [event for end, event in self.later if end <= self.now]
        self.later = [(end, event) for end, event in self.later if end > self.now]
        for event in done:
            self.in_hand[event.actor].pop(0)
        events, self.events = self.events + done, [Beat(actor, "always the same") for actor in self.hanging]
        return events

    def exclude_node(self, node):
        self.aside.append(node)

    def waiting_for(self):
        return "a core, of which none is free"
