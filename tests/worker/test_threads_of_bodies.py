"""A body hands its work to a thread and loses its connection: what the thread does is done once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from tests.support.stand import PATIENCE, Stand, ended, wait_until
from tests.support.worker import WorkerProcess
from tests.worker.green_stand import green

pytestmark = pytest.mark.worker

numbers = count(1)


@pytest.fixture(params=["prefork", "threads", "gevent"])
def pool(request: pytest.FixtureRequest) -> str:
    """The execution pool."""
    return str(request.param)


@pytest.fixture
def worker(pool: str, stand: Stand) -> Iterator[WorkerProcess]:
    if pool == "gevent":
        pytest.importorskip("gevent")
        with green(stand, "gevent") as started:
            yield started
    else:
        # One child: the task that releases the threads has to meet them.
        with stand.worker(pool=pool, concurrency=1 if pool == "prefork" else 4) as started:
            yield started


def posts(stand: Stand) -> list[str]:
    return [request.path for request in stand.echo.requests() if request.method == "POST"]


def test_what_a_thread_does_late_is_done_once(stand: Stand, worker: WorkerProcess, pool: str) -> None:
    """Nothing runs again while one is alive, in the process or through the broker, and the log names it."""
    stand.call("visit", "warm")
    sent: list[int] = []
    for to in ("thread", "daemon", "copied context", "executor", *(("greenlet",) if pool == "gevent" else ())):
        number = next(numbers)
        sent.append(number)
        result = ended(stand.send("hand_on", number, to))
        assert result.state == "FAILURE", to
        assert [entry.detail for entry in stand.entries("body")].count(number) == 1
        assert stand.orders(number) == []
    wait_until(lambda: worker.log().count("may still be at work") >= len(sent), "every refusal to be logged")
    for name in ("late", "module_0"):
        assert f"({name!r}" in worker.log() or f", {name!r}" in worker.log()
    stand.call("release")
    wait_until(lambda: len(posts(stand)) == len(sent), "every thread to send its request", PATIENCE)
    assert sorted(posts(stand)) == sorted(f"/echo/{number}" for number in sent)
    # With no thread left, a body runs again.
    number = next(numbers)
    stand.call("hand_on", number, "joined executor")
    assert [entry.detail for entry in stand.entries("body")].count(number) == 2
    assert stand.orders(number) == [0, 1]


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_other_tasks_forbid_nothing(stand: Stand, worker: WorkerProcess) -> None:
    """They run in threads, too, idle and busy, before and after the body began."""
    stand.call("visit", "warm")
    slow = [stand.send("slow_request", 3.0)]
    stand.wait_for_entry("slow_request")
    number = next(numbers)
    result = stand.send("hand_on", number, "nothing")
    slow.append(stand.send("slow_request", 3.0))
    result.get(timeout=PATIENCE)
    assert [entry.detail for entry in stand.entries("body")].count(number) == 2
    assert stand.orders(number) == [0, 1]
    for each in slow:
        each.get(timeout=PATIENCE)
