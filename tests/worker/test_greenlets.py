"""A worker whose tasks are greenlets of one process: gevent, and eventlet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.stand import PATIENCE, Stand, ended, wait_until
from tests.support.worker import WorkerProcess
from tests.worker.green_stand import GREENLETS, LIBRARIES, bodies, green, numbers
from tests.worker.test_seen import look, total

pytestmark = pytest.mark.worker


@pytest.fixture(scope="module", params=LIBRARIES)
def worker(shared: Stand, request: pytest.FixtureRequest) -> Iterator[WorkerProcess]:
    with green(shared, request.param) as started:
        yield started


def test_a_process_has_one_client_and_one_engine(shared: Stand, worker: WorkerProcess) -> None:
    """However many greenlets run, and with the concurrency for the connection pool's size."""
    accepted = shared.echo.accepted
    sent = [shared.send(name, f"token-{n}") for n in range(40) for name in ("visit", "stock", "configured")]
    answers = [result.get(timeout=PATIENCE) for result in sent]
    assert all(answer["right"] for answer in answers)
    assert {answer["size"] for answer in answers} == {GREENLETS}
    assert {answer["pid"] for answer in answers} == {worker.pid}
    assert len({answer["engine"] for answer in answers}) == 3
    for name in ("db", "stock", "engine"):
        assert 1 <= len(shared.backends(f"workerpools {name} pid=%")) <= GREENLETS
        assert worker.log().count(f"value_opened resource={name} ") == 1
    assert shared.echo.accepted - accepted <= 2 * GREENLETS


def test_concurrent_tasks_share_no_session(shared: Stand, worker: WorkerProcess) -> None:
    """Four bodies that are under way at the same time have four sessions on four connections."""
    sent = [shared.send("meet", 9000 + number) for number in range(GREENLETS)]
    answers = [result.get(timeout=PATIENCE) for result in sent]
    for of_its_own in ("thread", "session", "backend"):
        assert len({answer[of_its_own] for answer in answers}) == GREENLETS
    assert [answer["visible"] for answer in answers] == [1] * GREENLETS
    shared.database.execute("delete from orders")


def test_a_task_that_fails_undoes_its_own_work_alone(shared: Stand, worker: WorkerProcess) -> None:
    """Of four tasks with a transaction open at the same time two fail."""
    sent = [shared.send("meet", 9000 + number, number % 2 == 1) for number in range(GREENLETS)]
    assert [ended(result).state for result in sent] == ["SUCCESS", "FAILURE"] * 2
    assert [len(shared.orders(9000 + number)) for number in range(GREENLETS)] == [1, 0, 1, 0]
    assert {backend.state for backend in shared.backends()} == {"idle"}
    shared.database.execute("delete from orders")


def end_orphans(stand: Stand) -> None:
    """End the queries whose clients are gone: a server learns of that when the query has ended."""
    stand.database.execute(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
        " where datname = %s and state = 'active' and pid <> pg_backend_pid()",
        stand.database.name,
    )


@pytest.mark.parametrize("name", ["sell", "sell_stock"])
def test_a_query_lets_the_others_run(shared: Stand, worker: WorkerProcess, name: str) -> None:
    """While one body waits for the database, other tasks begin and end."""
    number = next(numbers)
    slow = shared.send(name, number, "sleep in a query")
    shared.wait_for_entry("sold", number)
    assert shared.call("plain", "meanwhile") == worker.pid
    assert shared.call(name, next(numbers))
    assert slow.state == "PENDING"
    slow.revoke(terminate=True)
    ended(slow)
    end_orphans(shared)


@pytest.mark.parametrize("how", ["sleep", "sleep in a query"])
@pytest.mark.parametrize("name", ["sell", "sell_stock"])
def test_a_killed_greenlet_undoes_its_work(shared: Stand, worker: WorkerProcess, name: str, how: str) -> None:
    """``revoke(terminate=True)`` raises GreenletExit in the body, or in the middle of its query: the row is not there,
    the body does not run again, and no connection is left in use."""
    number = next(numbers)
    result = shared.send(name, number, how)
    shared.wait_for_entry("sold", number)
    result.revoke(terminate=True)
    assert ended(result).state == "REVOKED"
    assert shared.call(name, next(numbers))
    resource = "db" if name == "sell" else "stock"

    def calm() -> bool:
        seen = total(look(shared), resource)
        # The server learns of a lost client when its query has ended.
        idle = [each for each in shared.backends(f"workerpools {resource} pid=%") if each.state == "idle"]
        return seen.in_use == seen.pending == 0 and seen.open == len(idle)

    wait_until(calm, "no connection in use, and none lost")
    assert shared.orders(number) == []
    assert bodies(shared, number) == 1
    end_orphans(shared)


def test_a_thread_of_the_bodys_own_has_no_session_of_it(shared: Stand, worker: WorkerProcess) -> None:
    """As under threads: the client and the engine, but not the session."""
    number = next(numbers)
    assert shared.call("spawn", number) == ["NoAttemptError", "spawned", "another"]
    assert shared.orders(number) == [0]


def test_terminated_backends_cost_one_replay_each(shared: Stand, worker: WorkerProcess) -> None:
    """Each task writes one row; the bodies that met a dead connection ran twice."""
    for name in ("sell", "sell_stock"):
        for result in [shared.send(name, next(numbers)) for _ in range(20)]:
            result.get(timeout=PATIENCE)
        before = worker.log().count("attempt_replayed ")
        assert shared.terminate_backends() > 0
        chosen = [next(numbers) for _ in range(20)]
        for result in [shared.send(name, number) for number in chosen]:
            result.get(timeout=PATIENCE)
        assert [shared.orders(number) for number in chosen] == [[0]] * 20
        replayed = worker.log().count("attempt_replayed ") - before
        assert replayed >= 1
        assert sum(bodies(shared, number) for number in chosen) == 20 + replayed
