"""The URL names two servers: tasks go where the primary is, also when that changes while the worker runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import psycopg2
import pytest

from demo_tasks.servers import PostgresServer, Workspace
from tests.support.services import require_program
from tests.support.stand import Stand
from tests.support.standby import Standby, pg_basebackup

pytestmark = pytest.mark.worker

LIMITS = {"none": {}, "soft": {"soft_time_limit": 40}}


@pytest.fixture
def primary(workspace: Workspace, request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    require_program(pg_basebackup)
    with PostgresServer(workspace, settings={"fsync": "off"}, name=f"primary-{id(request)}") as server:
        yield server


@pytest.fixture
def standby(workspace: Workspace, primary: PostgresServer, request: pytest.FixtureRequest) -> Iterator[Standby]:
    primary.start()
    execute(primary, "create table orders (number int, run int)")
    with Standby(workspace, primary, f"standby-{id(request)}") as server:
        yield server.start()


def execute(server: PostgresServer, statement: str) -> list[tuple[object, ...]]:
    with closing(psycopg2.connect(server.dsn, connect_timeout=10)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description is not None else []


@pytest.mark.parametrize("form", ["host:port twice", "lists"])
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_standby_takes_over(stand: Stand, primary: PostgresServer, standby: Standby, driver: str, form: str) -> None:
    """The standby is named first and is passed over. When the primary dies, the task on the dead connection goes back
    to the broker until the standby is promoted; then it and all others are served there, each row once."""
    servers = [standby, primary]
    if form == "lists":
        query = f"host={','.join(s.host for s in servers)}&port={','.join(str(s.port) for s in servers)}"
    else:
        query = "&".join(f"host={s.host}:{s.port}" for s in servers)
    url = (
        f"postgresql+{driver}://{primary.user}:{primary.password}@/postgres?{query}"
        "&target_session_attrs=read-write&connect_timeout=3"
    )
    with stand.worker(concurrency=1, env={"SHOP_DATABASE": url}) as worker:
        for number, (name, limit) in enumerate(LIMITS.items()):
            stand.call("patient", number, **limit)
            assert execute(primary, f"select count(*) from orders where number = {number}") == [(1,)], name
        primary.stop()
        waiting = [stand.send("patient", 10 + number, **limit) for number, limit in enumerate(LIMITS.values())]
        worker.wait_for_log("task_retried")
        execute(standby, "select pg_promote()")
        for result in waiting:
            result.get(timeout=60)
        for number, limit in enumerate(LIMITS.values()):
            stand.call("patient", 20 + number, **limit)
        assert execute(standby, "select number from orders order by number") == [(0,), (1,), (10,), (11,), (20,), (21,)]
        assert worker.stop() == 0
