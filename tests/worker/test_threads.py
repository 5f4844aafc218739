"""A worker whose tasks are threads of one process: one value for all of them, and a session for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.stand import PATIENCE, Stand, ended
from tests.support.worker import WorkerProcess

pytestmark = pytest.mark.worker

THREADS = 4


@pytest.fixture(scope="module")
def worker(shared: Stand) -> Iterator[WorkerProcess]:
    with shared.worker(pool="threads", concurrency=THREADS) as started:
        yield started


def test_the_connection_pool_has_the_concurrency_for_its_size(shared: Stand, worker: WorkerProcess) -> None:
    """However many tasks run, there is one engine and one client, and no more connections than threads."""
    accepted = shared.echo.accepted
    sent = [shared.send(name, f"token-{n}") for n in range(40) for name in ("visit", "stock", "configured")]
    answers = [result.get(timeout=PATIENCE) for result in sent]
    assert all(answer["right"] for answer in answers)
    assert {answer["size"] for answer in answers} == {THREADS}
    assert {answer["pid"] for answer in answers} == {worker.pid}
    assert len({answer["engine"] for answer in answers}) == 3
    for name in ("db", "stock", "engine"):
        assert 1 <= len(shared.backends(f"workerpools {name} pid=%")) <= THREADS
    assert shared.echo.accepted - accepted <= 2 * THREADS


def test_concurrent_tasks_share_no_session(shared: Stand, worker: WorkerProcess) -> None:
    """Four tasks that are in the middle of their bodies at the same time have four sessions on four connections, and
    none sees what another has written."""
    sent = [shared.send("meet", 9000 + number) for number in range(THREADS)]
    answers = [result.get(timeout=PATIENCE) for result in sent]
    for of_its_own in ("thread", "session", "backend"):
        assert len({answer[of_its_own] for answer in answers}) == THREADS
    assert [answer["visible"] for answer in answers] == [1] * THREADS
    shared.database.execute("delete from orders")


def test_a_task_that_fails_undoes_its_own_work_alone(shared: Stand, worker: WorkerProcess) -> None:
    """Of four tasks with a transaction open at the same time two fail: the rows of the other two are there."""
    sent = [shared.send("meet", 9000 + number, number % 2 == 1) for number in range(THREADS)]
    assert [ended(result).state for result in sent] == ["SUCCESS", "FAILURE"] * 2
    assert [len(shared.orders(9000 + number)) for number in range(THREADS)] == [1, 0, 1, 0]
    assert {backend.state for backend in shared.backends()} == {"idle"}
    shared.database.execute("delete from orders")
