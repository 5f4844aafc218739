"""One resource's numbers in one process."""

from __future__ import annotations

import threading
import time

import pytest

from workerpools._run.attempts import Attempt
from workerpools._run.failure import FailureKind
from workerpools._stats.memory import Board
from workerpools._stats.meter import Lease, Meter, finished
from workerpools._stats.metrics import FIRST
from workerpools._stats.snapshot import ResourceStats


def stats(meter: Meter) -> ResourceStats:
    return ResourceStats("db", "", meter.snapshot())


def taken_in(meter: Meter, attempt: Attempt) -> Lease:
    """A lease that ``attempt`` acquires."""
    attempt.enter()
    try:
        return meter.taken()
    finally:
        attempt.end()


def test_a_connection_that_is_opened_used_and_closed() -> None:
    """Each number moves when it should, and idle follows from the others."""
    meter = Meter()
    meter.limited(2)
    lease = meter.wait()
    assert stats(meter).pending == 1
    meter.opened()
    meter.created(0.25)
    lease.acquired(creating=0.25, reused=False)
    now = stats(meter)
    assert (now.open, now.in_use, now.idle, now.pending, now.limit) == (1, 1, 0, 0, 2)
    assert now.value("longest_use") > 0
    assert lease.returned()
    meter.closed("idle")
    now = stats(meter)
    assert (now.open, now.in_use, now.idle) == (0, 0, 0)
    assert now.value("longest_use") == 0
    assert now.labelled("closed")["idle"] == 1
    assert [now.histogram(name).count for name in ("acquire_wait", "create_time", "use_time")] == [1, 1, 1]
    assert now.value("reused") == 0


def test_a_wait_does_not_contain_the_time_to_connect() -> None:
    """What was spent on opening a connection is told apart."""
    meter = Meter()
    lease = meter.wait()
    lease.since -= 3.0
    lease.acquired(creating=2.5, reused=False)
    assert 0.5 <= stats(meter).histogram("acquire_wait").sum < 2.0


def test_a_wait_that_ended_without_a_connection() -> None:
    """A time-out counts as one and as a wait; an error is neither."""
    meter = Meter()
    meter.wait().gave_up(timed_out=True)
    meter.wait().gave_up()
    now = stats(meter)
    assert (now.pending, now.value("acquire_timeouts"), now.histogram("acquire_wait").count) == (0, 1, 1)


def test_what_was_not_taken_cannot_be_given_back() -> None:
    """A pool returns connections that no task ever got: those failed on the way."""
    meter = Meter()
    lease = meter.wait()
    assert not lease.returned()
    lease.gave_up()
    assert not lease.returned()
    assert stats(meter).histogram("use_time").count == 0


def test_longest_use_is_that_of_the_oldest_use() -> None:
    """Whichever connection comes back."""
    meter = Meter()

    def age() -> float:
        return finished(meter.row, now)[FIRST["longest_use"]]

    first, second, third = meter.taken(), meter.taken(), meter.taken()
    now = time.monotonic() + 100
    oldest = age()
    second.returned()
    assert age() == oldest >= 100
    first.returned()
    assert 100 <= age() < oldest
    third.returned()
    assert age() == 0


def test_leaks_are_what_the_ended_attempt_has_not_given_back() -> None:
    """Counted once; what another attempt uses is not this one's."""
    meter, attempt, other = Meter(), Attempt(), Attempt()
    left, returned = taken_in(meter, attempt), taken_in(meter, other)
    assert meter.attempt_ended(attempt) == [left]
    assert not meter.attempt_ended(attempt)
    left.returned()
    returned.returned()
    assert not meter.attempt_ended(other)
    assert (stats(meter).value("leaks"), stats(meter).value("attempts")) == (1, 3)


def test_what_another_thread_acquires_is_no_leak() -> None:
    """It may know the attempt by its context, as threads of asgiref do; its connection is its own all the same."""
    meter, attempt = Meter(), Attempt()
    thread = threading.Thread(target=taken_in, args=(meter, attempt))
    thread.start()
    thread.join(30)
    assert not meter.attempt_ended(attempt)
    assert (stats(meter).value("leaks"), stats(meter).in_use) == (0, 1)


def test_what_a_factory_acquires_for_its_value_is_no_leak() -> None:
    """Since a time: what was acquired before that is the attempt's."""
    meter, attempt = Meter(), Attempt()
    early = taken_in(meter, attempt)
    begun = time.monotonic()
    taken_in(meter, attempt)
    meter.disown(attempt, begun)
    assert meter.attempt_ended(attempt) == [early]


def test_the_longest_wait_is_seen_while_it_lasts() -> None:
    """As long as anybody waits: that of who waits longest, whoever is served first."""
    meter = Meter()
    waits = [meter.wait() for _ in range(3)]
    since = [lease.since for lease in waits]
    now = time.monotonic() + 100

    def age() -> float:
        return finished(meter.row, now)[FIRST["longest_wait"]]

    assert age() == pytest.approx(now - since[0])
    waits[1].acquired()
    assert age() == pytest.approx(now - since[0])
    waits[0].gave_up(timed_out=True)
    assert age() == pytest.approx(now - since[2])
    waits[2].acquired()
    assert (age(), stats(meter).pending) == (0, 0)


def test_a_stack_is_kept_only_where_it_is_wanted() -> None:
    """With it, what is held since long can be told with where it was acquired."""
    meter = Meter()
    meter.taken()
    meter.leak_after = 0.0
    kept = meter.taken()
    without, use = meter.held_since(time.monotonic())
    assert without.stack is None
    assert use is kept
    assert use.stack is not None
    assert use.stack.at.endswith("in test_a_stack_is_kept_only_where_it_is_wanted")
    assert "test_a_stack_is_kept_only_where_it_is_wanted" in str(use.stack)
    assert meter.held_since(use.since - 1.0) == []


@pytest.mark.parametrize(
    ("closes", "closing", "given", "counted"),
    [
        ("", "", "", "other"),
        ("", "", "stale", "stale"),
        ("", "lifetime", "idle", "lifetime"),
        ("shutdown", "", "idle", "shutdown"),
        ("shutdown", "stale", "", "shutdown"),
    ],
)
def test_why_a_connection_was_closed(closes: str, closing: str, given: str, counted: str) -> None:
    """What happens to the whole resource explains more than the connection's own state."""
    meter = Meter()
    meter.closes(closes)
    with meter.closing(closing):
        meter.closed(given)
    assert {reason: n for reason, n in stats(meter).labelled("closed").items() if n} == {counted: 1}


def test_checks_failures_and_events() -> None:
    """Each kind apart."""
    meter = Meter()
    meter.checked(alive=True)
    meter.checked(alive=False)
    for kind in FailureKind:
        meter.failed(kind)
    meter.failed(FailureKind.STALE)
    meter.count("replays")
    now = stats(meter)
    assert (now.value("checks"), now.value("failed_checks"), now.value("replays")) == (2, 1, 1)
    assert now.labelled("failures") == {kind.value: 2 if kind is FailureKind.STALE else 1 for kind in FailureKind}


def test_threads_lose_no_count() -> None:
    """Eight threads at once, none of them behind another's back."""
    meter, rounds = Meter(), 2000

    def work() -> None:
        for _ in range(rounds):
            lease = meter.wait()
            lease.acquired()
            lease.returned()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    now = stats(meter)
    assert now.value("reused") == now.histogram("use_time").count == now.histogram("acquire_wait").count == 8 * rounds
    assert (now.pending, now.in_use) == (0, 0)


def test_what_is_waited_for_and_used_is_seen_before_anything_is_published() -> None:
    """A task that waits or works for long is not told of only when it has ended."""
    board = Board.anonymous()
    slot, meter = board.claim(0), Meter()
    assert slot is not None
    meter.show(slot, slot.place("db", "") or 0)

    def seen() -> ResourceStats:
        (state,) = board.read(lambda pid: True)
        return ResourceStats("db", "", tuple(state.rows[0]))

    lease = meter.wait()
    assert seen().pending == 1
    lease.acquired()
    assert (seen().pending, seen().in_use, seen().value("reused")) == (0, 1, 0)
    lease.returned()
    assert seen().in_use == 0
    meter.attempt_ended(Attempt())
    assert seen().value("reused") == 1


def test_threads_close_connections_for_their_own_reasons() -> None:
    """Blocks that overlap in time neither share their reason nor leave it behind."""
    meter = Meter()
    entered, left = threading.Event(), threading.Event()

    def recycles() -> None:
        with meter.closing("recycled"):
            entered.set()
            assert left.wait(10)
            meter.closed()

    thread = threading.Thread(target=recycles)
    thread.start()
    assert entered.wait(10)
    with meter.closing("lifetime"):
        meter.closed()
    left.set()
    thread.join(10)
    meter.closed("idle")
    counted = {reason: n for reason, n in stats(meter).labelled("closed").items() if n}
    assert counted == {"recycled": 1, "lifetime": 1, "idle": 1}
