"""What becomes of the messages that a body sends, in a real worker whose database sessions are ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import chain

from tests.support.stand import Stand, wait_until
from tests.support.worker import WorkerProcess

pytestmark = pytest.mark.worker

APP = "tests.worker.messages:app"


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"SHOP_ONCE": str(tmp_path_factory.mktemp("once"))}


@pytest.fixture(scope="module")
def worker(shared: Stand, once: dict[str, str]) -> Iterator[WorkerProcess]:
    with shared.worker(app=APP, concurrency=1, env=once) as started:
        yield started


def count(stand: Stand, event: str, number: int) -> int:
    return sum(entry.detail == number for entry in stand.entries(event))


def settled(stand: Stand) -> None:
    """Wait until everything that was sent before has run: there is one process, and tasks run in order."""
    stand.call("child", 0)


@pytest.mark.parametrize(
    ("number", "way", "children"),
    [
        (1, "delay", 1),
        (2, "countdown", 1),
        (3, "signature", 2),
        (4, "by name", 1),
        (5, "chain", 2),
        (6, "group", 2),
        (7, "chord", 2),
        (8, "thread", 1),
        (9, "copied context", 1),
        (10, "called", 1),
        (11, "applied", 1),
    ],
)
def test_a_message_is_an_effect(shared: Stand, worker: WorkerProcess, number: int, way: str, children: int) -> None:
    """However it leaves: the body does not run again, the note says why, and nothing runs twice."""
    result = shared.outcome("parent", number, way)
    assert result.state == "FAILURE"
    assert count(shared, "body", number) == 1
    assert shared.orders(number) == []
    worker.wait_for_log("message 'shop.child' had left already")
    wait_until(lambda: count(shared, "child", number) >= children, "the children")
    settled(shared)
    assert count(shared, "child", number) == children


def test_a_retry_that_the_body_sends_is_one(shared: Stand, worker: WorkerProcess) -> None:
    """The retry runs; the run that sent it is not replayed beside it."""
    assert shared.outcome("parent", 12, "retry without raising").state in ("FAILURE", "SUCCESS")
    wait_until(lambda: shared.orders(12), "the retry")
    settled(shared)
    assert (count(shared, "body", 12), shared.orders(12)) == (2, [0])


@pytest.mark.parametrize(("number", "way"), [(20, "state"), (21, "event"), (22, "nothing")])
def test_what_is_no_effect(shared: Stand, worker: WorkerProcess, number: int, way: str) -> None:
    """A state is overwritten by the next one, an event is for monitors: the body runs again."""
    assert shared.call("parent", number, way) == []
    assert (count(shared, "body", number), shared.orders(number)) == (2, [0])


@pytest.mark.parametrize(("number", "link"), [(30, True), (31, False)])
def test_what_celery_sends_after_the_body(shared: Stand, worker: WorkerProcess, number: int, link: bool) -> None:
    """Callbacks and the next task of a chain follow the last run, once."""
    following = shared.client.signature("shop.child", (number,), immutable=True)
    if link:
        shared.call("parent", number, "nothing", link=following)
    else:
        chain(shared.client.signature("shop.parent", (number, "nothing")), following).apply_async()
    wait_until(lambda: count(shared, "child", number), "what follows")
    settled(shared)
    assert (count(shared, "body", number), count(shared, "child", number), shared.orders(number)) == (2, 1, [0])


def test_a_replacement(shared: Stand, worker: WorkerProcess) -> None:
    """It runs once, in the task's place."""
    assert shared.call("replaced", 40) == 40
    settled(shared)
    assert (count(shared, "body", 40), count(shared, "child", 40)) == (1, 1)


def test_callbacks_of_another_thread(stand: Stand, tmp_path: Path) -> None:
    """What Celery sends after a task in one thread is no effect of the body in another one."""
    with stand.worker(app=APP, pool="threads", concurrency=3, env={"SHOP_ONCE": str(tmp_path)}):
        waiting = stand.send("waits", 50)
        stand.wait_for_entry("waits", 50)
        last = stand.client.signature("shop.meets")
        chain(stand.client.signature("shop.sends", (50,)), last).apply_async()
        waiting.get(timeout=60)
        assert (count(stand, "body", 50), count(stand, "child", 50), stand.orders(50)) == (2, 1, [0])


@pytest.mark.parametrize(
    ("number", "way", "children"),
    [
        (101, "delay", 1),
        (102, "countdown", 1),
        (103, "signature", 2),
        (104, "by name", 1),
        (105, "chain", 2),
        (106, "group", 2),
        (107, "chord", 2),
        (108, "thread", 1),
        (109, "copied context", 1),
        (110, "called", 1),
        (112, "retry without raising", 0),
    ],
)
def test_a_body_that_holds_its_messages(
    shared: Stand, worker: WorkerProcess, number: int, way: str, children: int
) -> None:
    """However it sends them, none is an effect: the body runs again, and the messages of its last run leave."""
    retries = way.startswith("retry")
    result = shared.outcome("holding", number, way)
    wait_until(lambda: shared.orders(number), "the row")
    wait_until(lambda: count(shared, "child", number) >= children, "the children")
    settled(shared)
    assert (count(shared, "body", number), shared.orders(number)) == (2, [0])
    assert count(shared, "child", number) == children
    assert retries or result.result == []


@pytest.mark.parametrize(("number", "ending", "bodies"), [(120, "fail", 1), (121, "retry", 2)])
def test_held_messages_of_what_is_undone(
    shared: Stand, worker: WorkerProcess, number: int, ending: str, bodies: int
) -> None:
    """They are dropped; the retry itself leaves."""
    shared.outcome("holding", number, "group", ending)
    wait_until(lambda: count(shared, "body", number) == bodies, "the bodies")
    children = 2 if ending == "retry" else 0
    wait_until(lambda: count(shared, "child", number) >= children, "the children")
    settled(shared)
    assert (count(shared, "child", number), len(shared.orders(number))) == (children, children // 2)


def test_a_replacement_is_not_held(shared: Stand, worker: WorkerProcess) -> None:
    """It takes the place of the run that sends it, which commits nothing; what else the run sent is dropped."""
    assert shared.call("holding_replaced", 130) == [130, 130]
    settled(shared)
    assert (count(shared, "child", 130), shared.orders(130)) == (2, [])
    assert [entry for entry in shared.entries("looks") if entry.detail[0] == 130] == []


@pytest.mark.parametrize(
    ("number", "ending", "bodies"),
    [
        (201, "return", 1),
        (202, "lose", 2),
        (203, "retry", 2),
        (204, "fail", 1),
        (205, "unencodable", 1),
        (206, "wrong call", 1),
    ],
)
def test_messages_on_commit(shared: Stand, worker: WorkerProcess, number: int, ending: str, bodies: int) -> None:
    """Sent in order after the commit of the run that lasts, whose rows they find; a function that fails is logged."""
    result = shared.outcome("defers", number, ending)
    fails = bodies == 1 and ending != "return"
    if not fails:
        wait_until(lambda: count(shared, "called", number), "the function")
    settled(shared)
    seen = [entry.detail for entry in shared.entries("looks") if entry.detail[0] == number]
    assert seen == ([] if fails else [[number, what, 1] for what in ("first", "second", "third")])
    assert (count(shared, "body", number), count(shared, "called", number)) == (bodies, int(not fails))
    if fails:
        assert (result.state, shared.orders(number)) == ("FAILURE", [])
        return
    worker.wait_for_log("on_commit_failed task=shop.defers what=_second.<locals>.<lambda> error=ZeroDivisionError")
    if ending == "return":
        first, third = result.result
        assert third == f"third-{result.id}"
        for message, what in ((first, "first"), (third, "third")):
            assert shared.client.AsyncResult(message).get(timeout=60) == [number, what, 1]


def test_a_retry_that_does_not_leave(shared: Stand, worker: WorkerProcess) -> None:
    """The task fails with its error, and is not lost in silence; where the message leaves, it is retried."""
    result = shared.outcome("filtered", 301)
    assert result.state == "FAILURE"
    assert "OperationalError" in str(result.traceback)
    worker.wait_for_log("reason=the task's own apply_async() returned without having sent the retry")
    assert (count(shared, "body", 301), shared.orders(301)) == (1, [])
    assert shared.call("unfiltered", 302) == 302
    assert (count(shared, "body", 302), shared.orders(302)) == (2, [0])
    assert [line for line in worker.log().splitlines() if "task_retried" in line and "shop.filtered" in line] == []


def test_what_celery_retries_after_an_effect(shared: Stand, worker: WorkerProcess) -> None:
    """``autoretry_for`` does not know of effects: the reason says that Celery runs it again, as long as it does."""
    assert shared.outcome("autoretried", 303).state == "FAILURE"
    wait_until(lambda: count(shared, "child", 303) == 2, "the children of both runs")
    lines = [line for line in worker.log().splitlines() if "replay_refused" in line and "shop.autoretried" in line]
    assert ["Celery runs it again" in line for line in lines] == [True, False]
    assert all("message 'shop.child' had left already" in line for line in lines)
