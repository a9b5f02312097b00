"""Processes that list tables: as many as tables at a time, each ended with the pool."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nopad.embedding.inputs import table_pool
from nopad.embedding.inputs.table_pool import TablePool
from nopad.embedding.inputs.table_requests import Table


class FakeProcess:
    """A process that lists a table as two rows, which are its own number."""

    made: list[FakeProcess]

    def __init__(self, timeout: float | None) -> None:
        self.timeout, self.is_interrupted, self.is_closed = timeout, False, False
        self.made.append(self)

    def inputs(self, *arguments: object) -> Iterator[int]:
        assert not self.is_closed
        yield from [self.made.index(self)] * 2

    def interrupt(self) -> None:
        self.is_interrupted = True

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeProcess]:
    monkeypatch.setattr(FakeProcess, "made", [], raising=False)
    monkeypatch.setattr(table_pool, "TableProcess", FakeProcess)
    return FakeProcess.made


def listed(pool: TablePool) -> Iterator[object]:
    return iter(pool.inputs(Table("parquet", b"a.parquet"), "a.parquet", None, None))


def test_a_process_lists_one_table_after_another(made):
    pool = TablePool(7.0)
    assert [*listed(pool), *listed(pool)] == [0, 0, 0, 0]
    assert [process.timeout for process in made] == [7.0]


def test_tables_that_are_listed_at_the_same_time_have_processes_of_their_own(made):
    pool = TablePool(None)
    first, second = listed(pool), listed(pool)
    assert [next(first), next(second), next(first), next(second)] == [0, 1, 0, 1]
    assert [*first, *second] == []
    assert next(listed(pool)) in (0, 1)
    assert len(made) == 2


def test_a_process_whose_table_is_left_lists_the_next(made):
    pool = TablePool(None)
    left = listed(pool)
    next(left)
    left.close()
    assert [*listed(pool)] == [0, 0]


def test_closing_interrupts_what_is_listed_and_ends_each_process_once_it_is_free(made):
    pool = TablePool(None)
    busy, idle = listed(pool), listed(pool)
    next(busy)
    assert [*idle] == [1, 1]
    pool.close()
    assert [(process.is_interrupted, process.is_closed) for process in made] == [(True, False), (False, True)]
    assert [*busy] == [0]
    assert made[0].is_closed


def test_a_table_that_is_begun_after_the_end_is_interrupted_at_once(made):
    pool = TablePool(None)
    pool.close()
    late = listed(pool)
    next(late)
    assert made[0].is_interrupted
    late.close()
    assert made[0].is_closed
    assert [*listed(pool)] == [1, 1]
