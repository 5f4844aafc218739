"""What the demo says of servers that are not its own, and of a single one of anything."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from demo_tasks.runner.faults import Faults
from demo_tasks.servers import ExternalDatabase, ExternalRedis, ExternalUpstream, ServerError
from demo_tasks.summary import Summary
from demo_tasks.tally import Child


@pytest.mark.parametrize(
    ("server", "shown"),
    [
        (ExternalDatabase("postgres://app:secret@127.0.0.1:1/shop"), "127.0.0.1:1, from DATABASE_URL"),
        (ExternalDatabase("postgresql:///shop"), "local socket, from DATABASE_URL"),
        (ExternalRedis("redis://:secret@[::1]:6379/2"), "[::1]:6379, from REDIS_URL"),
        (ExternalUpstream("http://upstream/"), "upstream, from UPSTREAM_URL"),
        # A password that was not escaped: the host is a part of it.
        (ExternalDatabase("postgres://app:s@secret/x@db/shop"), "from DATABASE_URL"),
        (ExternalDatabase("postgres://app:s@secret?x@db/shop"), "from DATABASE_URL"),
    ],
)
def test_where_a_server_is(server: Any, shown: str) -> None:
    """Host and port, and the variable; no Python, and no password."""
    assert server.where == shown
    assert "secret" not in repr(server)


@pytest.mark.parametrize("url", ["foo", "postgres://app:p@ss:secret/x@db/shop", "redis://db"])
def test_a_url_that_cannot_be_used(url: str) -> None:
    """The message says that the variable may be unset, and nothing of the URL."""
    with pytest.raises(ServerError, match=r"DATABASE_URL .*unset it") as caught:
        ExternalDatabase(url)
    assert "secret" not in str(caught.value)


def test_one_of_anything_is_singular() -> None:
    """One connection, not 1 connections."""
    faults = Faults(None, None, cache=None, children=1, tasks=1, relay=None)  # type: ignore[arg-type]
    faults._terminated = 1
    assert str(faults) == "1 database connection cut"
    child = Child(Counter(place_order=1), Counter(api=1, db=2))
    summary = Summary(
        tasks=1,
        succeeded=1,
        failed=0,
        seconds=1.0,
        children={"a/1": child},
        rows={},
        rows_expected={},
        backends_killed=1,
    )
    assert "1 database connection" in "\n".join(summary.lines())
    assert "1 database connections" not in "\n".join(summary.lines())
    assert "2 database connections" in "\n".join(replace(summary, backends_killed=2).lines())
    [line] = summary.child_lines()
    assert line.startswith("a/1: 1 task; 1 connection of api ")
    assert ", 2 connections of db " in line
