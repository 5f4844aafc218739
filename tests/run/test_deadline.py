"""Deadlines, timeouts and lifetimes, as tables."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from tests.support.forking import run_in_fork
from workerpools import ConfigurationError, Deadline
from workerpools._pools.lifetime import Due, Lifetime, due
from workerpools._process.watchdog import Watchdog
from workerpools._run.deadline import NO_DEADLINE, seconds_allowed
from workerpools.httpx._transport import ClampedTimeouts
from workerpools.sqlalchemy._timeouts import fitting


@pytest.mark.parametrize(
    ("limits", "margin", "seconds"),
    [
        ([None, None], 0.1, None),
        ([], 0.1, None),
        ([10, None], 0.1, 9.9),
        ([10, 5, None], 0.1, 4.9),
        ([10, 5, 3.0], 0.0, 3.0),
        ([0.1], 0.1, 0.05),
        ([1], 5.0, 0.5),
        ([0, 8], 0.0, 8),
    ],
)
def test_how_long_a_task_may_take(limits: list[float | None], margin: float, seconds: float | None) -> None:
    """The least of its limits, minus a margin that takes half of it at most."""
    assert seconds_allowed(limits, margin) == seconds


def test_a_deadline_counts_down_to_nothing() -> None:
    """Never below 0; None where there is none."""
    coming, over = Deadline(time.monotonic() + 60), Deadline(time.monotonic() - 1)
    remaining = coming.remaining()
    assert remaining is not None
    assert 59 < remaining <= 60
    assert over.remaining() == 0.0
    assert NO_DEADLINE.remaining() is None
    assert (NO_DEADLINE.clamp(5.0), NO_DEADLINE.clamp(None)) == (5.0, None)
    assert coming.clamp(5.0) == 5.0
    assert coming.clamp(None) is not None
    assert over.clamp(5.0) == 0.0
    # A socket that is given 0 does not wait.
    assert (over.clamp(5.0, 0.001), over.clamp(None, 0.001), NO_DEADLINE.clamp(None, 0.001)) == (0.001, 0.001, None)
    assert over.clamp(0.0001, 0.001) == 0.0001
    assert coming.nearest(over) is over.nearest(coming) is over
    assert NO_DEADLINE.nearest(coming) is coming.nearest(NO_DEADLINE) is coming
    assert repr(NO_DEADLINE) == "Deadline(none)"
    assert repr(over) == "Deadline(in 0.000 s)"


@pytest.mark.parametrize(
    ("remaining", "current", "server", "sent"),
    [
        (None, 0, 0, None),
        (None, 2000, 0, 0),
        (None, 5000, 5000, None),
        (None, 2000, 5000, 5000),
        (2.0, 0, 0, 1950),
        (2.0, 1950, 0, None),
        (2.0, 1900, 0, None),
        (2.0, 1899, 0, 1950),
        (2.0, 2000, 0, None),
        (2.0, 2001, 0, 1950),
        (30.0, 29500, 0, None),
        (60.0, 59000, 0, None),
        (60.0, 58999, 0, 59500),
        (0.1, 0, 0, 75),
        (0.01, 0, 0, 7),
        (0.001, 0, 0, 1),
        (0.0, 0, 0, 975),
        (10.0, 0, 5000, 5000),
        (10.0, 5000, 5000, None),
        (5.0, 0, 5000, 5000),
        (3.0, 5000, 5000, 2925),
    ],
)
def test_the_timeout_that_fits(remaining: float | None, current: int, server: int, sent: int | None) -> None:
    """Never later than the deadline, a little earlier at most, and the user's own where that is shorter."""
    assert fitting(remaining, current, server) == sent


@pytest.mark.parametrize(
    ("age", "idle", "lives", "needs"),
    [
        (0.0, 0.0, 100.0, Due.NOTHING),
        (50.0, 0.9, 100.0, Due.NOTHING),
        (50.0, 1.0, 100.0, Due.CHECK),
        (50.0, 20.0, 100.0, Due.RETIREMENT),
        (100.0, 0.0, 100.0, Due.RETIREMENT),
        (1e9, 0.0, None, Due.NOTHING),
    ],
)
def test_what_a_connection_needs(age: float, idle: float, lives: float | None, needs: Due) -> None:
    """By its age and by how long it was idle."""
    assert due(Lifetime(check_after=1.0, max_idle=20.0), age=age, idle=idle, lives=lives) is needs


def test_what_is_never_due() -> None:
    """None is for ever."""
    assert due(Lifetime(None, None, None), age=1e9, idle=1e9, lives=None) is Due.NOTHING


def test_connections_of_one_moment_do_not_end_together() -> None:
    """Each draws its own life."""
    lifetime = Lifetime(max_lifetime=100.0, max_lifetime_jitter=0.2)
    assert [lifetime.drawn(chance) for chance in (0.0, 0.5, 1.0)] == [100.0, 90.0, 80.0]
    assert Lifetime(max_lifetime=None).drawn(0.5) is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"check_after": -1}, "check_after=-1"),
        ({"max_idle": "1"}, "max_idle='1'"),
        ({"max_lifetime": True}, "max_lifetime=True"),
        ({"max_lifetime_jitter": 1.5}, "max_lifetime_jitter=1.5"),
        ({"max_lifetime_jitter": None}, "max_lifetime_jitter=None"),
    ],
)
def test_a_wrong_lifetime_is_refused(options: dict[str, Any], named: str) -> None:
    """At once, by the option's name."""
    with pytest.raises(ConfigurationError, match=named):
        Lifetime(**options)


def test_timeouts_are_clamped_when_they_are_asked_for() -> None:
    """What waits for ever waits for the deadline."""
    timeouts = ClampedTimeouts({"read": 10.0, "pool": None}, Deadline(time.monotonic() + 5))
    assert timeouts.get("read") <= 5
    assert timeouts.get("pool") <= 5
    assert timeouts.get("connect", None) <= 5
    assert ClampedTimeouts({"read": 1.0}, NO_DEADLINE).get("read") == 1.0


def test_the_watchdog_shuts_down_what_is_not_forgotten() -> None:
    """In the order of their times, whichever came first; a child of a fork has one of its own."""
    dog = Watchdog()
    pairs = [socket.socketpair() for _ in range(3)]
    now = time.monotonic()
    late, soon, forgotten = (
        dog.watch(ours.fileno(), now + seconds) for (ours, _), seconds in zip(pairs, (0.4, 0.1, 0.2), strict=True)
    )
    assert dog.forget(forgotten)
    assert pairs[1][1].recv(1) == b""
    assert not dog.forget(soon)

    def child() -> bytes:
        ours, theirs = socket.socketpair()
        dog.watch(ours.fileno(), time.monotonic() + 0.05)
        theirs.settimeout(5)
        return theirs.recv(1)

    assert run_in_fork(child) == b""
    assert pairs[0][1].recv(1) == b""
    assert not dog.forget(late)
    pairs[2][0].sendall(b"x")
    assert pairs[2][1].recv(1) == b"x"
    for pair in pairs:
        for end in pair:
            end.close()


def test_the_watchdog_leaves_the_successor_of_a_closed_socket_alone() -> None:
    """The system gives the lowest free descriptor to the next file, whoever opens it."""
    dog = Watchdog()
    ours, theirs = socket.socketpair()
    number = dog.watch(ours.fileno(), time.monotonic() + 0.2)
    closed = ours.fileno()
    ours.close()
    theirs.close()
    ours, theirs = socket.socketpair()
    assert closed in (ours.fileno(), theirs.fileno())
    late = socket.socketpair()
    # Its turn comes after the first one's.
    dog.watch(late[0].fileno(), time.monotonic() + 0.4)
    assert late[1].recv(1) == b""
    assert not dog.forget(number)
    theirs.sendall(b"x")
    assert ours.recv(1) == b"x"
    for end in (ours, theirs, *late):
        end.close()


def test_the_watchdog_keeps_nothing_that_was_forgotten() -> None:
    """Statements are many, and their deadlines far away."""
    dog = Watchdog()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for _ in range(1000):
            assert dog.forget(dog.watch(ours.fileno(), time.monotonic() + 3600))
        assert not dog.watched


def test_the_watchdog_shuts_down_what_it_says_and_nothing_else() -> None:
    """Forgotten at the very moment its time comes, by many threads: a socket was shut down, or works for good."""
    dog = Watchdog()
    wrong: list[str] = []

    def use() -> None:
        for turn in range(150):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                number = dog.watch(ours.fileno(), time.monotonic() + (turn % 7) / 2000)
                time.sleep((turn % 5) / 2000)
                if dog.forget(number):
                    time.sleep(0.001)
                    theirs.settimeout(5)
                    try:
                        ours.sendall(b"x")
                        found = theirs.recv(1)
                    except OSError as error:
                        wrong.append(f"left alone, and shut down: {error}")
                    else:
                        if found != b"x":
                            wrong.append("left alone, and shut down")
                elif turn % 2 and theirs.recv(1) != b"":
                    # Else closed at once, and the number given to another thread's socket.
                    wrong.append("shut down, and open")

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
