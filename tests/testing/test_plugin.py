"""The fixtures that people's tests get, as they use them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from tests.support.databases import Database
from tests.support.faults import terminate_backends
from tests.support.paths import environment
from tests.support.shop import Shop, insert
from workerpools._celery.lifecycle import living


def pytest_in(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on a folder, with the plugins that are installed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:valkey", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(env), capture_output=True, text=True, check=False)


def test_unused_it_imports_nothing(tmp_path: Path) -> None:
    """It is loaded in every run of every project: without Celery, and without a client."""
    (tmp_path / "test_it.py").write_text(
        "import sys\n\n\ndef test_it(pytestconfig):\n"
        "    assert pytestconfig.pluginmanager.has_plugin('workerpools')\n"
        "    loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "    assert not loaded & {'celery', 'kombu', 'sqlalchemy'}, loaded\n"
        "    ours = [name for name in sys.modules if name.startswith('workerpools.')]\n"
        "    assert ours == ['workerpools.pytest_plugin']\n"
    )
    # Plugins of other packages import what they are for.
    others = [argument for name in ("pytest_httpx", "respx", "celery") for argument in ("-p", f"no:{name}")]
    result = pytest_in(tmp_path, *others)
    assert result.returncode == 0, result.stdout


LEAKS = """
import os

import pytest
from sqlalchemy import text
from workerpools import WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine

pools = WorkerPools()
db = pools.add(SQLAlchemyEngine(os.environ["DATABASE_URL"]), name="db")
pytestmark = pytest.mark.usefixtures("no_pool_leaks")
kept = []


def test_gives_back():
    with db.get().connect() as connection:
        connection.execute(text("select 1"))


def test_keeps():
    kept.append(db.get().connect())


def test_the_earlier_one_is_not_its_own():
    kept[0].close()


def test_ends():
    pools.close()
"""


def test_a_leak_fails_its_test(tmp_path: Path, database: Database) -> None:
    """That test alone, with the resource's name."""
    (tmp_path / "test_it.py").write_text(LEAKS)
    result = pytest_in(tmp_path, DATABASE_URL=database.url(), COLUMNS="120")
    assert "4 passed, 1 error" in result.stdout, result.stdout
    assert "ERROR test_it.py::test_keeps - Failed: connections that the test left in use: db: 1\n" in result.stdout


def test_overrides_end_with_the_test(pool_override: Callable[[Any, Any], Any], shop: Shop) -> None:
    """A stand-in is returned as it is, and the innermost counts."""
    own, fake = shop.engine.get(), object()
    assert pool_override(shop.engine, fake) is fake
    assert shop.engine.get() is fake
    assert pool_override(shop.engine, own) is own
    assert shop.engine.get() is own
    # Removed in order at the end.
    shop.engine.override(own)


def test_requests_are_answered_and_recorded(
    pool_requests: Callable[[Any, Callable[[httpx.Request], httpx.Response]], list[httpx.Request]], shop: Shop
) -> None:
    """With what the declaration adds to each."""
    shop.add_api("http://api.example.com/v1", headers={"X-Shop": "7"})
    sent = pool_requests(shop.api, lambda request: httpx.Response(200, json={"path": request.url.path}))

    @shop.task()
    def body(self: Any) -> Any:
        return self.api.post("/orders", json={}).json()

    assert body.delay().get() == {"path": "/v1/orders"}
    assert [(each.method, str(each.url), each.headers["X-Shop"]) for each in sent] == [
        ("POST", "http://api.example.com/v1/orders", "7")
    ]


@pytest.fixture
def written(shop: Shop, pool_transaction: Callable[[Any], Any]) -> Any:
    """The connection of a test whose writes are rolled back."""
    return pool_transaction(shop.engine)


def test_writes_are_rolled_back(shop: Shop, written: Any) -> None:
    """Of the body, of an eager task in it, and of neither if the body fails; the test reads them meanwhile."""

    @shop.task()
    def inner(self: Any, number: int) -> None:
        insert(self.session, number)

    @shop.task()
    def outer(self: Any, fails: bool) -> None:
        insert(self.session, 1)
        inner.delay(2)
        if fails:
            raise ValueError("after both")

    def seen() -> list[int]:
        return list(written.execute(text("select id from orders order by id")).scalars())

    with pytest.raises(ValueError, match="after both"):
        outer.delay(True).get()
    assert seen() == []
    outer.delay(False).get()
    assert seen() == [1, 2]
    assert shop.rows() == []


def test_failures_are_raised_at_once(shop: Shop, no_replays: None) -> None:
    """A stale connection would have had the body run again."""
    runs: list[int] = []

    @shop.task()
    def body(self: Any) -> None:
        runs.append(1)
        self.session.execute(text("select 1"))

    body.delay().get()
    terminate_backends(shop.database)
    with pytest.raises(Exception, match=r"terminat|closed"):
        body.delay().get()
    assert len(runs) == 2
    assert shop.replays() == 0


def test_every_pools_is_looked_at(shop: Shop) -> None:
    """In the order in which they were made."""
    assert living()[-1] is shop.pools
