"""The table by which a worker's main process tells its children what is to be recycled."""

from __future__ import annotations

import time

import pytest

from tests.pools.test_resource import Client
from tests.support.forking import run_in_fork
from workerpools import WorkerPools
from workerpools._stats.memory import ENTRIES, RECYCLE_SIZE, Board, RecycleTable


def table() -> RecycleTable:
    return RecycleTable(memoryview(bytearray(RECYCLE_SIZE * 8)).cast("d"))


# What is told.


def test_a_table_remembers_each_name_and_all_of_them() -> None:
    """The later of a name's own time and that of all counts, and the version moves each time."""
    made = table()
    assert (made.at("db"), made.cells[0]) == (0.0, 0.0)
    made.request(["db"], 5.0)
    made.request(["api", "cache"], 6.0)
    assert [made.at(name) for name in ("db", "api", "cache", "other")] == [5.0, 6.0, 6.0, 0.0]
    made.request([], 7.0)
    assert [made.at(name) for name in ("db", "other")] == [7.0, 7.0]
    made.request(["db"], 8.0)
    assert [made.at(name) for name in ("db", "api")] == [8.0, 7.0]
    assert made.cells[0] == 4.0


@pytest.mark.parametrize("name", ["d" * 56, "é" * 40, "(SQLAlchemyEngine sqlite://)"])
def test_a_name_of_any_length_is_found(name: str) -> None:
    """Cut as it is in a slot, perhaps within a character."""
    made = table()
    made.request(["other"], 1.0)
    made.request([name], 2.0)
    made.request([name], 3.0)
    assert made.at(name) == 3.0
    assert made.at("other") == 1.0


def test_a_full_table_means_everybody() -> None:
    """More is recycled than was asked for, and never less."""
    made = table()
    for number in range(ENTRIES):
        made.request([f"r{number}"], 1.0)
    made.request(["r0"], 2.0)
    assert (made.at("r0"), made.at("r1"), made.at("new")) == (2.0, 1.0, 0.0)
    made.request(["new"], 3.0)
    assert (made.at("new"), made.at("r1")) == (3.0, 3.0)


@pytest.mark.parametrize("in_file", [False, True], ids=["fork", "spawn"])
def test_a_child_is_told_by_its_parent(in_file: bool) -> None:
    """Through the board that it inherits, or opens; and it cannot tell its siblings anything."""
    board = Board.in_file() if in_file else Board.anonymous()
    with WorkerPools() as pools:
        resource = pools.add(lambda: Client(), name="client")
        pools.collector.share(board)

        def child() -> list[bool]:
            if in_file:
                pools.collector.share(Board.at(board.path))
            pools.collector.join(0)
            first = resource.get()
            same = resource.get() is first
            pools.collector._board.recycles.request(["client"], time.monotonic())  # type: ignore[union-attr]
            told = resource.get() is not first
            version = board.recycles.cells[0]
            pools.recycle()
            return [same, told, board.recycles.cells[0] == version]

        assert run_in_fork(child) == [True, True, True]
        parents = resource.get()
        pools.recycle("client")
        assert board.recycles.cells[0] == 2.0
        assert resource.get() is not parents
        # Whoever is started now has nothing to replace.
        assert run_in_fork(lambda: resource.get() is resource.get())
        pools.collector.share(None)
