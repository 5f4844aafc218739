"""Shared memory: what a child publishes is what its parent reads, however the child ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.stats.test_metrics import row
from tests.support.forking import run_in_fork, start_child
from tests.support.interruptions import Interruption, in_a_thread
from tests.support.paths import environment
from workerpools._stats import memory
from workerpools._stats.memory import PLACES, SLOTS, Board, Slot, SlotState, fold
from workerpools._stats.metrics import FIRST, WIDTH


def everybody(pid: int) -> bool:
    return True


def nobody(pid: int) -> bool:
    return False


def claim(board: Board, index: int = 0) -> Slot:
    slot = board.claim(index)
    assert slot is not None
    return slot


def publish(slot: Slot, name: str = "db", **numbers: float) -> None:
    place = slot.place(name, "database")
    assert place is not None
    slot.publish(slot.row(place), array("d", row(**numbers)))


def only(board: Board, alive: Callable[[int], bool] = everybody) -> SlotState:
    (state,) = board.read(alive)
    return state


def total(board: Board, name: str = "opened", alive: Callable[[int], bool] = nobody) -> float:
    """Return a counter over everything that was ever published."""
    return sum(
        fold(past, own)[FIRST[name]]
        for state in board.read(alive)
        for past, own in zip(state.past, state.rows, strict=True)
    )


def test_nothing_was_published() -> None:
    """A new board is empty, and reading it does not invent a process."""
    assert Board.anonymous().read(everybody) == []


def test_what_a_forked_child_publishes_is_read() -> None:
    """With its process id, names, kinds, and the tokens of its budget."""
    board = Board.anonymous()

    def child() -> int:
        slot = claim(board, 7)
        publish(slot, "api", opened=1)
        publish(slot, "db", opened=2, open=1)
        slot.publish_tokens(490, 500)
        return os.getpid()

    pid = run_in_fork(child)
    state = only(board)
    assert (state.index, state.pid, state.tokens, state.capacity, state.overflow) == (7, pid, 490, 500, 0)
    assert state.titles == (("api", "database"), ("db", "database"))
    assert list(state.rows) == [row(opened=1), row(opened=2, open=1)]
    assert not state.interrupted
    assert abs(time.time() - state.published) < 60


def test_a_successor_adds_to_what_its_predecessors_counted() -> None:
    """Recycled children: counters go on, gauges begin anew, and the successor's own row is its own."""
    board = Board.anonymous()
    for number in range(1, 5):
        run_in_fork(lambda: publish(claim(board), opened=10, open=1, in_use=1))
        state = only(board)
        assert list(state.rows) == [row(opened=10, open=1, in_use=1)]
        assert list(state.past) == [row(opened=10 * (number - 1))]
        assert total(board) == 10 * number


def test_a_successor_keeps_the_places_of_its_predecessors() -> None:
    """A name has one place in a slot, whoever declares it first, so that its counters stay together."""
    board = Board.anonymous()
    run_in_fork(lambda: [publish(claim(board), "first", opened=1), None][1])
    slot = claim(board)
    publish(slot, "second", opened=2)
    publish(slot, "first", opened=4)
    assert [name for name, _ in only(board).titles] == ["first", "second"]
    assert total(board) == 7


def test_a_slot_that_nobody_took_over_keeps_its_numbers() -> None:
    """The pool has shrunk: what its last child counted stays in the totals, and joins those of a later one."""
    board = Board.anonymous()
    for index in range(3):
        run_in_fork(lambda index=index: publish(claim(board, index), opened=1))  # type: ignore[misc]
    assert total(board) == 3
    run_in_fork(lambda: publish(claim(board, 1), opened=5))
    assert total(board) == 8


class _Interrupted(BaseException):
    pass


def stop_writes(monkeypatch: pytest.MonkeyPatch, slot: Slot) -> None:
    """Have the slot's next publication end half-way, as SIGKILL would have it."""

    def now() -> float:
        raise _Interrupted

    monkeypatch.setattr(memory, "_now", now)


def test_a_writer_that_was_killed_half_way_costs_the_reader_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it still counts as living, what was read before stays; afterwards what it has written counts; a successor
    goes on from there."""
    board = Board.anonymous()
    slot = claim(board)
    publish(slot, opened=1)
    assert only(board).rows[0] == row(opened=1)
    stop_writes(monkeypatch, slot)
    with pytest.raises(_Interrupted):
        publish(slot, opened=2)
    monkeypatch.undo()
    start = time.monotonic()
    state = only(board)
    assert time.monotonic() - start < 5
    assert state.rows[0] == row(opened=1)
    # It may just have been paused: only after a while it seems to have stopped.
    while not (state := only(board)).interrupted:
        assert time.monotonic() - start < 30
        time.sleep(0.01)
    assert time.monotonic() - start >= 1.0
    assert state.rows[0] == row(opened=1)
    assert only(board, nobody).rows[0] == row(opened=2)
    successor = claim(board)
    publish(successor, opened=4)
    state = only(board)
    assert not state.interrupted
    assert (state.past[0], state.rows[0]) == (row(opened=2), row(opened=4))


def test_a_publication_that_a_time_limit_ended_is_mended_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception from a signal's handler may strike anywhere."""
    board = Board.anonymous()
    slot = claim(board)
    stop_writes(monkeypatch, slot)
    with pytest.raises(_Interrupted):
        publish(slot, opened=2)
    monkeypatch.undo()
    publish(slot, opened=3)
    state = only(board)
    assert not state.interrupted
    assert state.rows[0] == row(opened=3)


def test_a_publication_that_is_struck_anywhere_stops_no_later_one() -> None:
    """By this thread or another."""
    board = Board.anonymous()
    slot, number = claim(board), 0
    while True:
        number += 1
        with Interruption(("/_stats/memory.py",), number, _Interrupted) as strike, suppress(_Interrupted):
            publish(slot, opened=0)
        if not strike.where:
            break
        publish(slot, opened=number)
        assert only(board).rows[0] == row(opened=number), strike.where
        in_a_thread(lambda: publish(slot, opened=-1) or True)
        assert only(board).rows[0] == row(opened=-1), strike.where
    assert number > 5


class _Dying:
    """A view whose writer dies before its n-th write."""

    def __init__(self, view: Any, writes: int) -> None:
        self._view = view
        self._left = writes

    def __getitem__(self, key: Any) -> Any:
        return self._view[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._left -= 1
        if self._left < 0:
            raise _Interrupted
        self._view[key] = value


@pytest.mark.parametrize("writes", range(30))
def test_a_successor_that_dies_while_it_takes_over_counts_nothing_twice(writes: int) -> None:
    """At any point: the totals are those from before, and so they are after the next one took over."""
    board = Board.anonymous()
    for index in range(2):
        slot = claim(board)
        publish(slot, "api", opened=1 + index)
        publish(slot, "db", opened=10 + index)
    assert total(board) == 24
    view: Any = _Dying(board._view, writes)
    try:
        Slot(view, board._bytes, 0)
    except _Interrupted:
        assert total(board) == 24
    assert total(board) == 24
    publish(claim(board), "db", opened=100)
    assert total(board) == 124


def test_totals_never_fall_while_children_are_killed_at_random() -> None:
    """Real children that do nothing but publish and are killed with SIGKILL at any moment; a reader looks on all the
    time. In the end not a count is missing but those of the very last publications."""
    board, last, ended = Board.anonymous(), 0.0, 0
    for _ in range(25):
        child = start_child(lambda: count_for_ever(board))
        with closing(os.fdopen(child.answers, "rb")):
            try:
                before = total(board)
                deadline = time.monotonic() + 30
                while total(board) < before + 50:
                    assert time.monotonic() < deadline
                    found = total(board, alive=everybody)
                    assert found >= last
                    last = found
            finally:
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
        ended += 50
        found = total(board)
        assert found >= max(last, ended)
        last = found


def count_for_ever(board: Board) -> None:
    slot = claim(board)
    place = slot.place("db", "")
    target, numbers = slot.row(place or 0), array("d", bytes(8 * WIDTH))
    while True:
        for cell in range(WIDTH):
            numbers[cell] += 1
        slot.publish(target, numbers)


def test_what_is_read_is_of_one_moment() -> None:
    """A writer that changes all its numbers together: no reader sees some of them from before."""
    board = Board.anonymous()
    child = start_child(lambda: count_for_ever(board))
    with closing(os.fdopen(child.answers, "rb")):
        try:
            looks, deadline = 0, time.monotonic() + 60
            while looks < 500 and time.monotonic() < deadline:
                states = board.read(everybody)
                if states and states[0].rows:
                    looks += 1
                    assert len(set(states[0].rows[0])) == 1
            assert looks == 500
        finally:
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)


def test_what_changed_while_it_was_read_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader never answers with numbers that may be of two moments."""
    board = Board.anonymous()
    slot = claim(board)
    publish(slot, opened=1)
    copy, left = board._copy, [2, 1]

    def slow(index: int) -> SlotState:
        found = copy(index)
        if left:
            publish(slot, opened=1 + 1 / left.pop())
        return found

    monkeypatch.setattr(board, "_copy", slow)
    assert only(board).rows[0] == row(opened=1.5)
    assert left == []


def test_resources_beyond_the_places_are_counted_as_such() -> None:
    """The first ones are seen, the others are told of by their number."""
    slot = claim(board := Board.anonymous())
    assert [slot.place(f"r{n}", "") for n in range(PLACES + 3)] == [*range(PLACES), None, None, None]
    assert only(board).overflow == 3
    assert slot.place("r0", "") == 0


@pytest.mark.parametrize(("index", "found"), [(0, True), (SLOTS - 1, True), (SLOTS, False), (-1, False)])
def test_children_beyond_the_slots_have_none(index: int, found: bool) -> None:
    """They work all the same."""
    assert (Board.anonymous().claim(index) is not None) is found


@pytest.mark.parametrize("name", ["db", "a" * 100, "ü" * 50, "datenbank-ä"])
def test_names(name: str) -> None:
    """A long one is cut, never within a character, and stays one resource."""
    slot = claim(board := Board.anonymous())
    assert slot.place(name, "http") == slot.place(name, "http") == 0
    ((shown, kind),) = only(board).titles
    assert kind == "http"
    assert name.startswith(shown)
    assert len(shown.encode()) <= 56
    assert claim(board).place(name, "http") == 0


def test_another_process_opens_the_file(tmp_path: Path) -> None:
    """With spawn nothing is inherited: the child opens the mapping by its path, and nothing is left of the file."""
    board = Board.in_file()
    try:
        code = (
            "import sys; from array import array; from workerpools._stats.memory import Board;"
            "from workerpools._stats.metrics import WIDTH; slot = Board.at(sys.argv[1]).claim(3);"
            "slot.publish(slot.row(slot.place('db', 'database')), array('d', [2.0] * WIDTH))"
        )
        subprocess.run([sys.executable, "-c", code, board.path], env=environment(), check=True, timeout=60)
        state = only(board)
        assert (state.index, state.titles, state.rows[0]) == (3, (("db", "database"),), [2.0] * WIDTH)
    finally:
        board.remove()
    if not board.path.startswith("/proc/"):
        assert not os.path.exists(board.path)


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    """It is of another version."""
    path = tmp_path / "board"
    path.write_bytes(b"\0" * 4096)
    with pytest.raises(ValueError):
        Board.at(str(path))


def test_reading_64_children_takes_little_time() -> None:
    """With three resources each: a few milliseconds; held to much more on a machine that is busy."""
    board = Board.anonymous()
    for index in range(64):
        slot = claim(board, index)
        for name in ("api", "db", "stock"):
            publish(slot, name, opened=1)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        assert len(board.read(everybody)) == 64
        took.append(time.perf_counter() - start)
    assert min(took) < 0.1
