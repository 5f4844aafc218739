"""Libraries that wrap, replace or watch Celery's tasks, all at once in one worker that has beat, too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import celery
import pytest

from tests.support.stand import PATIENCE, Stand, ended, wait_until
from tests.support.worker import WorkerProcess
from tests.worker.seeing import look

pytestmark = pytest.mark.worker

APP = "tests.worker.together:app"

for _library in ("celery_once", "celery_singleton", "flask", "pydantic", "sentry_sdk"):
    pytest.importorskip(_library)
pytest.importorskip("opentelemetry.instrumentation.celery")

KINDS = ["once", "singleton", "flask", "shared", "class", "injected"]
# Celery 5.4 has no pydantic=True, and 5.5 does not know annotations that are strings.
KINDS += ["pydantic"] if celery.VERSION >= (5, 6) else []
#: How often the body runs, the run that wrote its row, and the state in the end.
TROUBLES: dict[str, tuple[int, list[int], str]] = {
    "none": (1, [0], "SUCCESS"),
    "lost": (2, [0], "SUCCESS"),
    "declined": (2, [1], "SUCCESS"),
    "failed": (1, [], "FAILURE"),
}
NUMBERS = {(kind, trouble): n for n, (kind, trouble) in enumerate(((k, t) for k in KINDS for t in TROUBLES), 100)}


@pytest.fixture(scope="module")
def worker(shared: Stand) -> Iterator[WorkerProcess]:
    conf = {
        "beat_schedule": {"tick": {"task": "shop.tick", "schedule": 0.5}},
        "worker_pool_restarts": True,
        "worker_soft_shutdown_timeout": 3.0,
    }
    with shared.worker(app=APP, args=["-B"], conf=conf, env={"REMAP_SIGTERM": "SIGQUIT"}) as started:
        yield started


@pytest.fixture(scope="module")
def sent(shared: Stand, worker: WorkerProcess) -> dict[tuple[str, str], list[str]]:
    """The ids of every kind of task with every kind of trouble, sent before any is looked at."""
    ids = {}
    for (kind, trouble), number in NUMBERS.items():
        arguments: tuple[Any, ...] = (number, trouble)
        if kind == "pydantic":
            arguments = ({"number": number, "trouble": trouble},)
        ids[kind, trouble] = shared.send("send", kind, *arguments)
    return {key: result.get(timeout=PATIENCE) for key, result in ids.items()}


def result_of(stand: Stand, task_id: str) -> Any:
    return ended(stand.client.AsyncResult(task_id))


def bodies(stand: Stand, number: int) -> int:
    return sum(entry.detail == number for entry in stand.entries("body"))


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("kind", KINDS)
def test_kind(shared: Stand, sent: dict[tuple[str, str], list[str]], kind: str, trouble: str) -> None:
    """A lost session is replayed, a 503 goes back to the broker, an error of the body is raised: whatever the base."""
    runs, rows, state = TROUBLES[trouble]
    number = NUMBERS[kind, trouble]
    result = result_of(shared, sent[kind, trouble][0])
    assert (result.state, shared.orders(number), bodies(shared, number)) == (state, rows, runs), result.traceback
    if state == "SUCCESS":
        assert result.result == ({"number": number} if kind == "pydantic" else number)


@pytest.mark.parametrize("kind", ["once", "singleton"])
def test_locks_are_released(shared: Stand, sent: dict[tuple[str, str], list[str]], kind: str) -> None:
    """Also after a replay, a retry and a failure: each can be sent again."""
    for trouble, (runs, _, _) in TROUBLES.items():
        number = NUMBERS[kind, trouble]
        first = sent[kind, trouble][0]
        result_of(shared, first)
        # A lock is released after the result is there.
        (again,) = wait_until(lambda: sent_again(shared, kind, number, "none", first), f"the lock of {kind} {trouble}")  # noqa: B023
        assert result_of(shared, again).state == "SUCCESS"
        assert bodies(shared, number) == runs + 1


def sent_again(stand: Stand, kind: str, number: int, trouble: str, first: str) -> list[str]:
    """Send a task; return its id, or nothing while the lock of the first one is held."""
    return [task_id for task_id in stand.call("send", kind, number, trouble) if task_id != first]


def test_singleton_that_swallows_retries(shared: Stand, worker: WorkerProcess) -> None:
    """Its task fails, with the reason, and is not lost; it can be sent again."""
    first = ""
    for attempt in (1, 2):
        # A lock is released after the result is there.
        (task_id,) = wait_until(lambda first=first: sent_again(shared, "locked", 500, "declined", first), "the lock")
        first = task_id
        result = result_of(shared, task_id)
        assert (result.state, bodies(shared, 500), shared.orders(500)) == ("FAILURE", attempt, [])
        assert "503" in str(result.result)
    worker.wait_for_log("the task's own apply_async() returned without having sent the retry")


def test_sentry(shared: Stand, sent: dict[tuple[str, str], list[str]]) -> None:
    """A task that fails sends one event; one that is replayed or retried sends none."""
    for ids in sent.values():
        result_of(shared, ids[0])
    for (_, trouble), ids in sent.items():
        if trouble == "failed":
            shared.wait_for_entry("sentry event", ids[0])
    told = [entry.detail for entry in shared.entries("sentry event")]
    for (_, trouble), ids in sent.items():
        assert told.count(ids[0]) == (trouble == "failed"), trouble


def test_opentelemetry(shared: Stand, sent: dict[tuple[str, str], list[str]]) -> None:
    """Each run has one span, replays included; the span of a retry is a child of the publishing in the run before."""
    for ids in sent.values():
        result_of(shared, ids[0])
    for (kind, trouble), ids in sent.items():
        runs = 2 if trouble == "declined" else 1

        def spans(name: str, task: str = ids[0]) -> list[list[Any]]:
            return [s.detail for s in shared.entries("span") if s.detail[0] == name and s.detail[1] == task]

        # A span is written after the result is stored.
        wait_until(lambda: len(spans(f"run/shop.{kind}")) == runs, f"{runs} spans of {kind} {trouble}")  # noqa: B023
        of_runs = spans(f"run/shop.{kind}")
        assert [ok for *_, ok in of_runs] == [trouble != "failed"] * runs
        published = {span[2]: span[3] for span in spans(f"apply_async/shop.{kind}")}
        assert len(published) == runs
        if runs == 2:
            assert published[of_runs[1][3]] == of_runs[0][2]


def test_batches(shared: Stand, worker: WorkerProcess) -> None:
    """Several messages are one attempt: replayed as a whole, never half, and not sent back to the broker."""
    pytest.importorskip("celery_batches", reason="celery-batches 0.11 refuses Celery 5.7; nox -s tests has it with 5.6")
    for trouble, number in (("lost", 200), ("none", 210), ("declined", 220)):
        for each in (number, number + 1):
            shared.send("batch", each, trouble if each == number else "none")
        wait_until(
            lambda number=number: [number, number + 1] in [entry.detail for entry in shared.entries("batch")], trouble
        )
        if trouble == "declined":
            worker.wait_for_log("it was called directly, without a broker to retry through")
        else:
            wait_until(lambda number=number: shared.orders(number + 1), trouble)
        rows = [] if trouble == "declined" else [0]
        assert [shared.orders(number), shared.orders(number + 1)] == [rows, rows]
        assert bodies(shared, number) == (2 if trouble == "lost" else 1)
    assert len(shared.entries("batch")) == 4


def test_chord(shared: Stand, worker: WorkerProcess) -> None:
    """Members that are retried and replayed by us count once, when they have succeeded; the chord's body runs once."""
    members = [(300, "none"), (301, "declined"), (302, "lost"), (303, "declined")]
    body = shared.call("chord", members)
    assert result_of(shared, body).result == 300 + 301 + 302 + 303
    assert [sorted(entry.detail) for entry in shared.entries("total")] == [[300, 301, 302, 303]]
    assert [shared.orders(number) for number, _ in members] == [[0], [1], [0], [1]]
    assert result_of(shared, shared.call("chain", 310, "declined")).result == 311


def test_beat(shared: Stand, worker: WorkerProcess) -> None:
    """-B: its process is a child of the worker that runs no task; it is none of the worker's in the statistics."""
    shared.wait_for_entry("tick", count=2)
    runs_tasks = {process.pid for process in look(shared).processes}
    assert len(runs_tasks) == 2
    (beat,) = set(worker.children()) - runs_tasks
    assert {entry.pid for entry in shared.entries("tick")} <= runs_tasks
    assert f"pid={beat}" not in worker.log()


@pytest.mark.slow
def test_restart_and_soft_shutdown(shared: Stand, worker: WorkerProcess) -> None:
    """pool_restart closes the connections of the children before; a soft shutdown, by way of SIGTERM, lets a task end
    that is quick enough, rolls back one that is not, and its message goes back to the queue."""
    before = {process.pid for process in look(shared).processes}
    shared.reach_all(sorted(before))
    lost = shared.disorderly_ends()
    shared.client.control.pool_restart(reload=False)
    after = wait_until(
        lambda: (
            (now := {process.pid for process in look(shared).processes}) and len(now) == 2 and not now & before and now
        ),
        "two other children",
    )
    shared.reach_all(sorted(after))
    for pid in before:
        for resource in ("api", "db"):
            assert worker.log().count(f"value_closed resource={resource} pid={pid}") == 1
        assert not any(f" pid={pid}" in backend.application_name for backend in shared.backends())
    assert shared.disorderly_ends() == lost
    # The first event of a new child starts Sentry's thread in a body, where it forbids the replay.
    assert (shared.outcome("class", 410, "reported").state, shared.orders(410)) == ("FAILURE", [])
    assert "sentry-sdk.BackgroundWorker" in worker.log()
    lost = shared.disorderly_ends()
    quick, slow = shared.send("hold", 400, 1.0), shared.send("hold", 401, 60.0)
    shared.wait_for_entry("hold", 400)
    shared.wait_for_entry("hold", 401)
    worker.stop()
    assert "Initiating Soft Shutdown" in worker.log()
    assert (ended(quick).state, shared.orders(400)) == ("SUCCESS", [0])
    assert shared.orders(401) == []
    shared.wait_for_no_connection()
    assert shared.disorderly_ends() == lost
    with shared.client.connection_for_read() as connection:
        assert any(slow.id.encode() in message for message in connection.default_channel.client.lrange("celery", 0, -1))
