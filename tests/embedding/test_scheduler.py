"""Which actor makes which shard, and what happens where one dies, hangs or fails."""

import logging
import re
import threading
from collections import Counter

import pytest
from fake_engine import (
    NOTHING_SKIPPED,
    ROWS,
    FakeEngine,
    HangError,
    KilledError,
    LostMachineError,
    PreemptedError,
    UnreachableError,
)

from nopad.embedding.actors.actor_pool import ActorPool
from nopad.embedding.actors.engine import Beat, Died, Loaded, NodeError, Task
from nopad.embedding.actors.scheduler import Scheduler
from nopad.embedding.actors.work import Work


def scheduler(engine, actors=1, stall=600.0, stop=None, check=lambda first, record: None):
    pool = ActorPool(engine, None, begun={}, record=lambda value: value, check=check, clock=lambda: engine.now)
    return Scheduler(pool, actors, stall=stall, stop=stop or threading.Event())


def works(number):
    return [Work(Task(0, shard), f"shard-{shard}", lambda: range(ROWS)) for shard in range(number)]


def run(engine, number=6, **options):
    """Which shards were made, with what skipped; which were given up, and why."""
    made, given_up = {}, {}
    for work, result in scheduler(engine, **options).make(works(number), number):
        if result is None:
            given_up[work.task.shard] = work.not_made
        else:
            made[work.task.shard] = dict(work.task.skipped)
    return made, given_up


def rows_of(task):
    return [row for row in (range(ROWS) if task.probe is None else task.probe) if row not in task.skipped]


@pytest.mark.parametrize("poison", [{0}, {63}, {17}, {5, 6, 40}])
def test_images_that_end_their_process_are_isolated_and_all_others_made(poison):
    def does(node, task):
        if task.shard == 2 and poison & {*rows_of(task)}:
            raise KilledError
        return 0

    made, given_up = run(FakeEngine(does), actors=2)
    assert given_up == {}
    assert {*made} == {*range(6)}
    assert {*made.pop(2)} == poison
    assert {**made} == {shard: {} for shard in (0, 1, 3, 4, 5)}


def test_reason_of_an_image_that_ends_its_process():
    def does(node, task):
        if 3 in rows_of(task):
            raise KilledError
        return 0

    made, _ = run(FakeEngine(does), number=1)
    assert made == {0: {3: "the process that embedded it died, also with it alone: it was ended by SIGSEGV"}}


def test_a_process_that_dies_once_costs_nothing():
    deaths = Counter()

    def does(node, task):
        deaths[task.shard] += 1
        if deaths[task.shard] == 1:
            raise KilledError
        return 0

    engine = FakeEngine(does)
    assert run(engine) == (NOTHING_SKIPPED, {})
    assert all(task.probe is None for _, task in engine.log)


def test_preemptions_are_no_deaths():
    preemptions = Counter()

    def does(node, task):
        preemptions[task.shard] += 1
        if preemptions[task.shard] < 30:
            raise PreemptedError
        return 0

    engine = FakeEngine(does)
    assert run(engine, number=2) == ({0: {}, 1: {}}, {})
    assert all(task.probe is None for _, task in engine.log)


def test_machines_that_fail_are_no_deaths_unless_one_shard_takes_several_with_it():
    class Engine(FakeEngine):
        def send(self, actor, task):
            lost[task.shard] += 1
            if (task.shard in (1, 2) and lost[task.shard] < 3) or (task.shard == 3 and 7 in rows_of(task)):
                self.log.append((self.node_of[actor], task))
                self.events.append(Died(actor, "its node has died", with_node=True))
            else:
                super().send(actor, task)

    lost = Counter()
    engine = Engine(lambda node, task: 0)
    made, given_up = run(engine)
    assert {shard: [*skipped] for shard, skipped in made.items()} == {0: [], 1: [], 2: [], 3: [7], 4: [], 5: []}
    assert given_up == {}
    assert {task.shard for _, task in engine.log if task.probe} == {3}


def test_a_shard_that_is_too_much_at_once_is_given_up_and_the_others_made():
    def does(node, task):
        if task.shard == 1 and len(rows_of(task)) == ROWS:
            raise KilledError
        return 0

    made, given_up = run(FakeEngine(does), actors=2)
    assert {*made} == {0, 2, 3, 4, 5}
    assert "died while it made it: it was ended by SIGSEGV; with its images in parts none did" in given_up[1]


def test_where_every_process_dies_the_job_ends():
    def does(node, task):
        raise KilledError

    with pytest.raises(ChildProcessError, match=r"processes died one after another and no shard was made.*SIGSEGV"):
        run(FakeEngine(does), actors=2)


def test_where_every_process_dies_loading_the_job_ends():
    class Engine(FakeEngine):
        def start(self):
            self.number += 1
            self.events.append(Died(self.number, "it was ended by SIGKILL"))
            return self.number

    with pytest.raises(ChildProcessError, match=r"3 processes died while they loaded the encoder.*SIGKILL"):
        run(Engine(lambda node, task: 0))


def test_deaths_while_loading_end_the_job_only_one_after_another():
    class Engine(FakeEngine):
        def load(self, actor, program, begun):
            if actor in (1, 2, 4, 5):
                self.events.append(Died(actor, "it was ended by SIGKILL"))
            else:
                super().load(actor, program, begun)

    engine = Engine(lambda node, task: 0)
    assert run(engine, actors=2) == (NOTHING_SKIPPED, {})
    assert engine.number == 6


def test_a_shard_that_hangs_is_made_elsewhere(caplog):
    def does(node, task):
        if node == "b" and task.shard == 3:
            raise HangError
        return 0

    engine = FakeEngine(does, nodes=("a", "b"))
    assert run(engine, actors=2, stall=50.0) == (NOTHING_SKIPPED, {})
    tried = [node for node, task in engine.log if task.shard == 3]
    assert tried in (["a"], ["b", "a"])
    if tried == ["b", "a"]:
        assert "shard-3: no progress in 50 s (process 1 on host-b); it is made elsewhere" in caplog.text
    assert engine.now < 200


def test_a_shard_that_hangs_everywhere_is_reported():
    def does(node, task):
        if task.shard == 3:
            raise HangError
        return 0

    made, given_up = run(FakeEngine(does, nodes=("a", "b")), actors=2, stall=50.0)
    assert {*made} == {0, 1, 2, 4, 5}
    assert given_up[3].startswith("no progress in 50 s, in 2 processes, the last was process")


def test_without_a_limit_a_slow_shard_is_waited_for():
    engine = FakeEngine(lambda node, task: 0)

    def does(node, task):
        raise HangError

    engine.does = does
    stop = threading.Event()
    generator = scheduler(engine, stall=None, stop=stop).make(works(1), 1)
    with pytest.raises(AssertionError, match="does not end"):
        next(generator)


def test_attempts_that_fail_are_tried_again_and_then_given_up():
    attempts = Counter()

    def does(node, task):
        attempts[task.shard] += 1
        if task.shard == 4 or (task.shard == 1 and attempts[1] < 3):
            raise UnreachableError("7.jpg: Input/output error")
        return 0

    engine = FakeEngine(does, nodes=("a", "b", "c", "d"))
    made, given_up = run(engine, actors=4)
    assert {*made} == {0, 1, 2, 3, 5}
    assert re.fullmatch(r"7.jpg: Input/output error \(the last of 3 attempts, by process \d on host-.\)", given_up[4])
    assert len({node for node, task in engine.log if task.shard == 4}) == 3


def test_on_one_node_an_attempt_that_failed_is_left_to_the_next_run():
    def does(node, task):
        if task.shard == 4:
            raise UnreachableError("7.jpg: Input/output error")
        return 0

    engine = FakeEngine(does)
    made, given_up = run(engine)
    assert {*made} == {0, 1, 2, 3, 5}
    assert given_up == {4: "7.jpg: Input/output error"}
    assert len(engine.log) == 6


def test_other_errors_end_the_job():
    def does(node, task):
        raise ValueError("another job")

    with pytest.raises(ValueError, match="another job"):
        run(FakeEngine(does))


def test_a_node_that_lacks_the_sources_is_set_aside_and_its_shards_are_made_elsewhere(caplog):
    """Failing is fast: the sick node makes nearly all, before another has its first shard."""
    rows = {}

    def does(node, task):
        if node == "sick":
            rows[task.shard] = "failed"
            return ROWS
        rows[task.shard] = "ok"
        return 1

    engine = FakeEngine(does, nodes=("healthy", "sick"), slow={"healthy": 100.0})
    made, given_up = run(engine, number=40, actors=2)
    assert {*made} == {*range(40)}
    assert given_up == {}
    assert {*rows.values()} == {"ok"}
    assert engine.aside == ["sick"]
    assert "host-sick is set aside: most inputs of shard-" in caplog.text
    assert [node for node, _ in engine.log].count("sick") > 30


def test_damaged_files_set_no_node_aside():
    def does(node, task):
        return ROWS if task.shard % 2 else 0

    engine = FakeEngine(does, nodes=("a", "b"))
    made, _ = run(engine, number=64, actors=2)
    assert {*made} == {*range(64)}
    assert engine.aside == []
    assert len(engine.log) < 64 + 14  # few of them are made twice


def test_with_one_node_nothing_is_made_twice():
    engine = FakeEngine(lambda node, task: ROWS)
    made, _ = run(engine, number=8, actors=2)
    assert len(engine.log) == len(made) == 8


def test_a_node_where_attempts_fail_is_set_aside():
    def does(node, task):
        if node == "b":
            raise UnreachableError("mount: Stale file handle")
        return 0

    engine = FakeEngine(does, nodes=("a", "b", "c"))
    made, given_up = run(engine, number=60, actors=3)
    assert {*made} == {*range(60)}
    assert given_up == {}
    assert engine.aside == ["b"]


def test_a_node_with_another_installation_is_set_aside(caplog):
    def check(first, record):
        if record != first:
            raise ValueError("weights: 1 there, 2 now")

    engine = FakeEngine(lambda node, task: 0, nodes=("b", "a", "b"), loads=lambda node: {"weights": node == "b"})
    made, _ = run(engine, actors=2, check=check)
    assert {*made} == {*range(6)}
    assert {node for node, _ in engine.log} == {"a"}
    assert "host-b is set aside: host-b has another checkpoint or installation: weights" in caplog.text


def test_processes_start_together_and_the_first_loads_before_the_others():
    engine = FakeEngine(lambda node, task: 0)
    schedule = scheduler(engine, actors=4)
    assert schedule.load(3) == {"record": "same"}
    assert engine.number == 3
    assert engine.loaded_by == [(1, {}), (2, {"record": "same"}), (3, {"record": "same"})]


@pytest.mark.parametrize("num_places", [8, 2])
def test_where_the_first_dies_loading_another_loads_first(num_places):
    class Engine(FakeEngine):
        def load(self, actor, program, begun):
            if actor == 1:
                self.loaded_by.append((actor, begun))
                self.events.append(Died(actor, "it was ended by SIGKILL"))
            else:
                super().load(actor, program, begun)

    engine = Engine(lambda node, task: 0, starts=lambda number: number <= num_places)
    assert scheduler(engine, actors=2).load(2) == {"record": "same"}
    assert engine.loaded_by[:3] == [(1, {}), (2, {}), (3, {"record": "same"})][:num_places]


def test_an_actor_that_waits_for_the_first_to_load_does_not_stall():
    class Engine(FakeEngine):
        def load(self, actor, program, begun):
            if actor == 1:
                self.later.append((self.now + 50.0, Loaded(actor, {"record": "same"})))
            else:
                super().load(actor, program, begun)

        def wait(self, seconds):
            return [*super().wait(seconds), Beat(1, self.now)]

    engine = Engine(lambda node, task: 0)
    engine.in_hand[1] = [None]
    scheduler(engine, actors=2, stall=10.0).load(2)
    assert engine.killed == []


def test_the_only_node_is_not_set_aside():
    def loads(node):
        raise NodeError("the job's files cannot be read")

    with pytest.raises(NodeError, match="the job's files cannot be read"):
        run(FakeEngine(lambda node, task: 0, loads=loads))


def test_waiting_for_room_is_logged(caplog):
    stop = threading.Event()

    class Engine(FakeEngine):
        def wait(self, seconds):
            if self.now > 70:
                stop.set()
            return super().wait(seconds)

    assert run(Engine(lambda node, task: 0, starts=lambda number: False), stop=stop) == ({}, {})
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.partition(":")[2] for line in lines] == [
        " none has started in 20 s: a core, of which none is free",
        " none has started in 40 s: a core, of which none is free",
    ]


def test_a_stop_finishes_shards_in_hand():
    stop = threading.Event()

    def does(node, task):
        stop.set()
        return 0

    made, _ = run(FakeEngine(does), stop=stop)
    assert {*made} == {0}


def test_an_actor_that_is_ready_gets_the_next_shard_before_the_last_is_done():
    engine = FakeEngine(lambda node, task: 0, slow={"a": 5.0}, is_ready=True)
    assert run(engine) == (NOTHING_SKIPPED, {})
    assert engine.together == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]
    engine = FakeEngine(lambda node, task: 0, slow={"a": 5.0})
    run(engine)
    assert engine.together == [[shard] for shard in range(6)]


def test_a_shard_whose_rows_are_tried_again_waits_for_an_actor_of_its_own():
    """It is not read ahead: where it waited behind another, an actor that is idle could have it."""
    engine = FakeEngine(lambda node, task: 0, slow={"a": 5.0}, is_ready=True)
    given = works(2)
    given.insert(1, Work(Task(0, 7, retry=True), "shard-7", lambda: range(ROWS)))
    outcomes = [work.task.shard for work, _ in scheduler(engine).make(given, 3)]
    assert outcomes == [0, 7, 1]
    assert engine.together == [[0], [7], [1]]


def test_an_actor_that_was_ready_for_one_shard_is_asked_again_for_the_next():
    class Engine(FakeEngine):
        def send(self, actor, task):
            self.is_ready = task.shard == 0
            super().send(actor, task)

    engine = Engine(lambda node, task: 0, slow={"a": 5.0})
    assert run(engine, number=4)[1] == {}
    assert engine.together == [[0], [0, 1], [2], [3]]


@pytest.mark.parametrize("poison", [0, 1, 3])
def test_of_two_shards_that_end_their_process_the_right_one_is_found(poison):
    """An actor dies that had two: both are made alone then, and the one without fault is made whole."""

    def does(node, task):
        if task.shard == poison and 17 in rows_of(task):
            raise KilledError
        return 0

    engine = FakeEngine(does, slow={"a": 5.0}, is_ready=True)
    made, given_up = run(engine)
    assert given_up == {}
    assert {shard: {*skipped} for shard, skipped in made.items()} == {**{i: set() for i in range(6)}, poison: {17}}
    probes = [task.shard for _, task in engine.log if task.probe is not None]
    assert {*probes} == {poison}
    first = next(number for number, (_, task) in enumerate(engine.log) if task.shard == poison)
    again = [shards for shards in engine.together[first + 1 :] if poison in shards]
    assert again == [[poison]] * len(again)


def test_a_shard_that_hangs_costs_none_beside_it():
    def does(node, task):
        if task.shard == 1:
            raise HangError
        return 0

    made, given_up = run(FakeEngine(does, slow={"a": 50.0}, is_ready=True), stall=60.0)
    assert {*made} == {0, 2, 3, 4, 5}
    assert {*given_up} == {1}


@pytest.mark.parametrize("what", ["hang", "preempted"])
def test_a_shard_that_waits_behind_another_is_made_elsewhere(what):
    tried = Counter()

    def does(node, task):
        tried[task.shard] += 1
        if task.shard == 1 and tried[1] == 1:
            raise {"hang": HangError, "preempted": PreemptedError}[what]
        return 0

    engine = FakeEngine(does, slow={"a": 5.0}, is_ready=True)
    assert run(engine, actors=1, stall=60.0) == (NOTHING_SKIPPED, {})


def test_two_shards_on_a_machine_that_fails_are_made_alone_and_neither_is_charged():
    """Three machines that fail over a shard alone count as one death: its images are not tried in parts yet."""
    sent = Counter()

    def does(node, task):
        sent[task.shard] += 1
        if (task.shard, sent[task.shard]) in ((1, 1), (0, 2), (0, 3), (0, 4)):  # behind shard 0, which is alone then
            raise LostMachineError
        return 0

    engine = FakeEngine(does, slow={"a": 5.0}, is_ready=True)
    assert run(engine, number=3) == ({0: {}, 1: {}, 2: {}}, {})
    assert engine.together == [[0], [0, 1], [0], [0], [0], [0], [1], [2]]
    assert all(task.probe is None for _, task in engine.log)


def test_two_shards_on_a_machine_that_is_preempted_share_the_next():
    sent = Counter()

    def does(node, task):
        sent[task.shard] += 1
        if task.shard == 1 and sent[1] == 1:
            raise PreemptedError
        return 0

    engine = FakeEngine(does, slow={"a": 5.0}, is_ready=True)
    assert run(engine, number=3) == ({0: {}, 1: {}, 2: {}}, {})
    assert engine.together[2:] == [[0], [0, 2], [1]]


def test_a_shard_that_is_to_be_made_alone_stays_so_when_its_machine_is_preempted():
    sent = Counter()

    def does(node, task):
        sent[task.shard] += 1
        if (task.shard, sent[task.shard]) == (1, 1):  # behind shard 0
            raise KilledError
        if (task.shard, sent[task.shard]) == (0, 2):
            raise PreemptedError
        return 0

    engine = FakeEngine(does, slow={"a": 5.0}, is_ready=True)
    assert run(engine, number=3) == ({0: {}, 1: {}, 2: {}}, {})
    assert engine.together == [[0], [0, 1], [0], [0], [1], [2]]


def test_a_shard_with_which_something_went_wrong_shares_no_actor():
    deaths = Counter()

    def does(node, task):
        deaths[task.shard] += 1
        if task.shard == 0 and deaths[0] == 1:
            raise KilledError
        return 0

    engine = FakeEngine(does, slow={"a": 5.0}, is_ready=True)
    assert run(engine, number=3) == ({0: {}, 1: {}, 2: {}}, {})
    assert engine.together == [[0], [0], [1], [1, 2]]


def test_an_actor_is_not_ready_for_what_follows_a_shard_that_it_had_alone():
    class Engine(FakeEngine):
        def send(self, actor, task):
            self.is_ready = task.shard == 0
            super().send(actor, task)

    engine = Engine(lambda node, task: 0, slow={"a": 5.0})
    given = works(3)
    given.insert(1, Work(Task(0, 7, retry=True), "shard-7", lambda: range(ROWS)))
    assert len([*scheduler(engine).make(given, 4)]) == 4
    assert engine.together == [[0], [7], [1], [2]]


def failing_on(sick, rows):
    """What a node does that fails with all rows; `rows` is filled with what has become of each shard's."""

    def does(node, task):
        rows[task.shard] = "failed" if node == sick else "ok"
        return ROWS if node == sick else 0

    return does


def test_shards_in_hand_on_a_node_that_is_set_aside_are_made_elsewhere():
    """Both that an actor there has, also the one that it reads ahead."""

    class Engine(FakeEngine):
        def send(self, actor, task):
            self.is_ready = self.node_of[actor] == "sick"
            super().send(actor, task)

    rows = {}
    engine = Engine(failing_on("sick", rows), nodes=("healthy", "sick"), slow={"healthy": 13.0, "sick": 5.0})
    made, given_up = run(engine, number=40, actors=2)
    assert {*made} == {*range(40)}
    assert given_up == {}
    assert {*rows.values()} == {"ok"}
    assert engine.aside == ["sick"]


def test_shards_of_a_node_that_is_set_aside_get_as_many_actors_as_there_are():
    rows = {}
    engine = FakeEngine(failing_on("sick", rows), nodes=("healthy", "sick"), slow={"healthy": 100.0})
    made, _ = run(engine, number=6, actors=2)
    assert {*made} == {*range(6)}
    assert engine.aside == ["sick"]
    assert {*rows.values()} == {"ok"}
    assert sorted(task.shard for node, task in engine.log if node == "healthy") == [*range(6)]
    assert engine.number == 3


def test_an_actor_that_hangs_is_not_replaced_where_another_is_idle_for_the_last_shard():
    attempts = Counter()

    def does(node, task):
        attempts[task.shard] += 1
        if task.shard == 1 and attempts[1] == 1:
            raise HangError
        return 0

    engine = FakeEngine(does)
    assert run(engine, number=2, actors=2) == ({0: {}, 1: {}}, {})
    assert [task.shard for _, task in engine.log] == [0, 1, 1]
    assert engine.number == 2


def test_a_shard_that_is_read_ahead_has_the_whole_time_from_its_turn_on():
    engine = FakeEngine(lambda node, task: 0, slow={"a": 50.0}, is_ready=True)
    assert run(engine, stall=60.0) == (NOTHING_SKIPPED, {})
    assert engine.killed == []


def test_a_shard_that_no_other_node_is_left_to_compare_stays_as_it_is():
    def does(node, task):
        if node == "b" and task.replace:
            raise NodeError("the job's files cannot be read")
        return ROWS if node == "a" and task.shard == 1 else 0

    engine = FakeEngine(does, nodes=("b", "a"), slow={"b": 20.0})
    made, given_up = run(engine, number=4, actors=2)
    assert ({*made}, given_up) == ({0, 1, 2, 3}, {})
    assert engine.aside == ["b"]
    assert [node for node, task in engine.log if task.shard == 1] == ["a", "b"]


def test_a_stop_does_not_wait_for_shards_that_are_read_ahead():
    def does(node, task):
        if task.shard == 3:
            stop.set()
        return 0

    stop = threading.Event()
    engine = FakeEngine(does, slow={"a": 5.0}, is_ready=True)
    assert run(engine, actors=2, stop=stop) == ({0: {}, 1: {}}, {})
    assert [task.shard for _, task in engine.log] == [0, 1, 2, 3]
    assert sorted(engine.killed) == [1, 2]


def test_no_more_actors_than_shards():
    engine = FakeEngine(lambda node, task: 0)
    run(engine, number=2, actors=8)
    assert engine.number == 2


def test_an_actor_loads_where_no_shard_is_missing():
    engine = FakeEngine(lambda node, task: 0)
    assert scheduler(engine, actors=8).load(0) == {"record": "same"}
    assert engine.number == 1
