"""One decode process at work on a file or on a batch of files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass

from nopad.pipeline.decode_channel import NO_EVENTS, Answer, DecodeChannel
from nopad.pipeline.decode_queue import MAX_BATCH, Task
from nopad.pipeline.image_processor import PreparedImage
from nopad.preprocessing.decode import ImageError, UnreachableError

logger = logging.getLogger(__name__)

_BATCH_SECONDS = 10.0  # for all of a batch; then each of its files has its own time


@dataclass(eq=False, slots=True)
class DecodeWork:
    """A process at work.

    Attributes:
        process: decodes.
        tasks: the files that it was sent.
        steps: its conversation with this process; resumed when what it has yielded has happened.
        timeout: seconds for all of it, `None` for no limit.
        events: the events of the connection that `steps` waits for.
    """

    process: DecodeChannel
    tasks: list[Task]
    steps: Generator[int, None, list[Answer]]
    timeout: float | None
    events: int = NO_EVENTS

    @classmethod
    def begin(
        cls,
        process: DecodeChannel,
        tasks: list[Task],
        *,
        timeout: float | None,
        max_processes: int,
        notify: Callable[[], None],
    ) -> DecodeWork:
        """Work that is not sent yet; each call of `steps` goes on with it.

        Args:
            timeout: seconds for one file, `None` for no limit.
            max_processes: how many share the memory for files whose size is not measured yet.
            notify: called when there may be memory.
        """
        if tasks[0].alone:
            return cls(process, tasks, _one(process, tasks[0], timeout, notify), timeout)
        timeout = min(timeout or _BATCH_SECONDS, _BATCH_SECONDS)
        allowance = tasks[0].reservation.budget.allowance(MAX_BATCH * max_processes)
        files, reservations = [task.data for task in tasks], [task.reservation for task in tasks]
        return cls(process, tasks, process.prepare_batch(files, reservations, allowance, timeout, notify), timeout)

    @property
    def waits_for_memory(self) -> bool:
        """Whether it waits for memory, and for nothing that its process sends or takes."""
        return self.events == NO_EVENTS

    def deliver(self, answers: list[Answer], seconds: float) -> list[Task]:
        """Call `done` of the tasks, each with `seconds`; returns those of a batch that have to be tried alone."""
        again = []
        for task, answer in zip(self.tasks, answers, strict=True):
            if isinstance(answer, PreparedImage):
                task.done(answer, seconds)
            elif "alone" in answer:
                again.append(task)
            else:
                if "traceback" in answer:
                    logger.error("unexpected error in a decoder:\n%s", answer["traceback"])
                kind = UnreachableError if answer.get("unreachable") is True else ImageError
                task.done(kind("image", str(answer["error"])), seconds)
        return again

    def timeout_error(self) -> ImageError:
        """The error of a file that takes too long: while it is read, its disk or mount does."""
        advice = "input_timeout sets another limit"
        if self.process.is_reading:
            reason = f"unreachable: reading it takes more than {self.timeout:g} s; {advice}"
            return UnreachableError("image", reason)
        return ImageError("image", f"decoding it takes more than {self.timeout:g} s; {advice}")


def _one(
    process: DecodeChannel, task: Task, timeout: float | None, notify: Callable[[], None]
) -> Generator[int, None, list[Answer]]:
    answer = yield from process.prepare(task.data, task.reservation, timeout, notify)
    return [answer]
