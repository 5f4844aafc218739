"""The demo on servers that run already and have other users."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import redis

from demo_tasks.servers import HttpUpstream, Workspace
from tests.demo.running import DemoRun, report
from tests.support.databases import Database

pytestmark = [pytest.mark.slow, pytest.mark.worker, pytest.mark.timeout(300)]


def test_two_runs_on_the_same_servers(
    place: Path, tmp_path: Path, workspace: Workspace, database: Database, broker_url: str
) -> None:
    """Two runs share the servers without disturbing each other or the tables there, and leave nothing on them."""
    database.execute("CREATE TABLE orders (mine int)")
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    arguments = ("--once", "--tasks", "200", "--concurrency", "2", "--report")
    with HttpUpstream(workspace, name="demo-upstream") as upstream:
        env = {"DATABASE_URL": database.dsn, "REDIS_URL": broker_url, "UPSTREAM_URL": upstream.url()}
        with (
            DemoRun(*arguments, str(files[0]), cwd=tmp_path, env=env) as one,
            DemoRun(*arguments, str(files[1]), cwd=tmp_path, env=env) as two,
        ):
            assert (one.wait(), two.wait()) == (0, 0), one.text + two.text
    for file in files:
        figures = report(file)
        assert figures["failed"] == 0
        assert figures["children"] == 2
        assert figures["rows"] == dict.fromkeys(("orders", "payments", "shipments", "reservations"), 25)
        # Its own worker's connections, and not the other one's.
        assert figures["backends_killed"] == 2
        # The servers are somebody else's: their connections are not closed.
        assert figures["upstream_reloaded"] is False
        assert figures["cache_killed"] == 0
        assert figures["connections_at_stop"] == 0

    assert database.execute("SELECT count(*) FROM orders") == [(0,)]
    tables = "SELECT table_schema, table_name FROM information_schema.tables WHERE table_schema !~ '^(pg_|information)'"
    assert database.execute(tables) == [("public", "orders")]
    assert database.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'workerpools%'") == []
    with closing(redis.Redis.from_url(broker_url)) as client:
        assert client.keys("*") == []
