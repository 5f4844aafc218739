"""Each child of a prefork worker opens one value of each resource, whatever runs in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support.inspect import socket_inodes
from tests.support.stand import PATIENCE, Stand, sockets_to, wait_until
from tests.support.worker import WorkerProcess

pytestmark = pytest.mark.worker

CHILDREN = 4
TASKS = 200
NAMES = ("visit", "stock", "configured")


@pytest.fixture(scope="module")
def worker(shared: Stand) -> Iterator[WorkerProcess]:
    with shared.worker(concurrency=CHILDREN, env={"SHOP_TOUCHES": "1"}) as started:
        yield started


def test_a_child_touches_nothing_before_its_first_task(shared: Stand, worker: WorkerProcess) -> None:
    """worker_process_init opens no socket and builds no client, engine or TLS context; the parent builds the TLS
    contexts, one a client, and no child builds another."""
    wait_until(lambda: len(shared.entries("process_init")) == CHILDREN, "all children to have started")
    children = worker.children()
    assert {entry.pid for entry in shared.entries("process_init")} == set(children)
    shared.reach_all(children)
    for child in children:
        events = [entry.event for entry in shared.entries() if entry.pid == child]
        before = events[: events.index("task")]
        assert before == ["process_init"]
        after = Counter(events[events.index("task") :])
        assert after["client"] == after["engine"] == after["database connection"] == 1
        assert after["tls context"] == 0
    own = Counter(entry.event for entry in shared.entries() if entry.pid == worker.pid)
    assert own["tls context"] == 2
    assert own["client"] == own["engine"] == own["database connection"] == 0


def test_one_open_a_process_for_any_number_of_tasks_and_bases(shared: Stand, worker: WorkerProcess) -> None:
    """200 tasks of three bases over four children: one backend an engine and at most one upstream connection a client
    in each child, no socket in two processes, none of them in the parent."""
    children = worker.children()
    for name in NAMES:
        shared.reach_all(children, name)
    sent = [(NAMES[number % 3], shared.send(NAMES[number % 3], f"token-{number}")) for number in range(TASKS)]
    answers = [(name, result.get(timeout=PATIENCE)) for name, result in sent]
    assert all(answer["right"] for _, answer in answers)
    assert {answer["pid"] for _, answer in answers} <= set(children) == set(worker.children())

    opened = Counter(backend.application_name.partition(" pid=")[0] for backend in shared.backends())
    assert opened == {"workerpools db": CHILDREN, "workerpools stock": CHILDREN, "workerpools engine": CHILDREN}
    # `api` serves two bases, `http` the third one.
    assert shared.echo.accepted == 2 * CHILDREN
    backends_used = {(answer["pid"], name, answer["backend"]) for name, answer in answers}
    assert len({backend for _, _, backend in backends_used}) == len(backends_used) == 3 * CHILDREN
    assert len({(answer["pid"], name, answer["engine"]) for name, answer in answers}) == 3 * CHILDREN

    held = [socket_inodes(pid) for pid in children]
    assert sum(map(len, held)) == len(set().union(*held))
    assert not set().union(*held) & socket_inodes(worker.pid)
    for port in (shared.database.port, shared.echo.port):
        assert not sockets_to(port, worker.pid)
        assert all(sockets_to(port, pid) for pid in children)


def test_a_prefork_child_keeps_one_connection(shared: Stand, worker: WorkerProcess) -> None:
    """A child runs one task at a time: its connection pool keeps one connection, whoever declared the engine."""
    for name in NAMES:
        assert shared.call(name, "size")["size"] == 1


def test_a_task_without_resources_opens_none(shared: Stand, worker: WorkerProcess) -> None:
    """Only what a body uses is opened."""
    accepted, opened = shared.echo.accepted, len(shared.backends())
    shared.reach_all(worker.children(), "plain")
    assert (shared.echo.accepted, len(shared.backends())) == (accepted, opened)
