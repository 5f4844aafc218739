"""What newcomers get wrong is refused where it stands, with a sentence that says what to write instead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import celery
import httpx
import pytest
import sqlalchemy
from celery import Celery, Task
from sqlalchemy import text
from sqlalchemy.orm import Session

from tests.support.paths import environment
from workerpools import (
    ConfigurationError,
    NoAttemptError,
    PooledTask,
    WorkerPools,
)
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession


def new_app() -> Celery:
    return Celery("mistakes", set_as_current=False)


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


# --- drivers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "driver", "wanted"),
    [
        ("postgresql+psycopg://app@db/shop", "psycopg", 'pip install "psycopg[binary]"'),
        ("postgresql+psycopg2://app@db/shop", "psycopg2", "pip install psycopg2-binary"),
        ("mysql+pymysql://app@db/shop", "pymysql", "pymysql"),
    ],
)
def test_a_driver_that_is_not_installed(url: str, driver: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error stays the import's own; a note says which driver the URL asks for, and how to get it."""
    monkeypatch.setitem(sys.modules, driver, None)
    resource = WorkerPools(new_app()).add(SQLAlchemyEngine(url), name="db")
    for ask in (resource.get, resource.adapter.prepare):
        with pytest.raises(ImportError) as caught:
            ask()
        assert f"the driver {driver!r}" in notes_of(caught.value)
        assert wanted in notes_of(caught.value)


def test_a_url_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLAlchemy chooses the driver, another one from version to version: the note tells which, and how to choose."""
    url = sqlalchemy.make_url("postgresql://app@db/shop")
    driver = url.get_driver_name()
    monkeypatch.setitem(sys.modules, driver, None)
    resource = WorkerPools(new_app()).add(SQLAlchemyEngine(url), name="db")
    with pytest.raises(ImportError) as caught:
        resource.get()
    assert f"names no driver, and SQLAlchemy {sqlalchemy.__version__} defaults to {driver!r}" in notes_of(caught.value)
    assert ("postgresql+psycopg2://" in notes_of(caught.value)) is (driver != "psycopg2")


def test_postgres_is_no_scheme() -> None:
    """Which hosting services write all the same."""
    with pytest.raises(ConfigurationError, match=r"write postgresql\+psycopg2://") as caught:
        SQLAlchemyEngine("postgres://app:hunter2@db/shop")
    assert "hunter2" not in str(caught.value)


# --- bodies ------------------------------------------------------------------------------------------------------


async def coroutine_body(*_: Any) -> None: ...


def modelled(app: Celery) -> None:
    """Declare an async body with models."""
    pytest.importorskip("pydantic")
    app.task(base=PooledTask, pydantic=True, shared=False, name="shop.sync")(coroutine_body)


async def async_generator_body(*_: Any) -> AsyncIterator[int]:
    yield 1


def generator_body(*_: Any) -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("bind", [True, False])
@pytest.mark.parametrize(
    ("body", "what"),
    [
        (async_generator_body, "asynchronous generator function"),
        (generator_body, "generator function"),
    ],
)
def test_bodies_that_would_never_run(body: Any, what: str, bind: bool) -> None:
    """Celery would call them, and lose what that returns."""
    app = new_app()
    # Not shared: other tests' apps would register it, too.
    app.task(base=PooledTask, bind=bind, shared=False, name="shop.sync")(body)
    with pytest.raises(ConfigurationError, match=rf"shop\.sync: .*{what}"):
        app.finalize()
    assert "shop.sync" not in app.tasks


@pytest.mark.skipif(celery.VERSION < (5, 5), reason="Celery has pydantic=True since 5.5")
def test_async_bodies_with_models() -> None:
    """Celery's wrapper would dump the coroutine, and hides what the body is."""
    app = new_app()
    modelled(app)
    with pytest.raises(ConfigurationError, match=r"shop\.sync: the body is async def with pydantic=True"):
        app.finalize()


def test_class_based_bodies_that_would_never_run() -> None:
    """A class-based task defines ``run``, itself or in a base."""
    app = new_app()

    class Base(PooledTask):
        def run(self) -> Iterator[int]:
            yield 1

    class Sync(Base):
        name = "shop.sync"

    with pytest.raises(ConfigurationError, match=r"shop\.sync"):
        app.register_task(Sync())
    assert "shop.sync" not in app.tasks


def test_bodies_that_do_run() -> None:
    """A plain function around an asynchronous one, a class with ``run``, and one without."""
    import asyncio
    import functools

    app = new_app()

    @functools.wraps(coroutine_body)
    def around() -> str:
        asyncio.run(coroutine_body())
        return "ran"

    class Sync(PooledTask):
        name = "shop.sync"

        def run(self) -> str:
            return "ran"

    class Abstract(PooledTask):
        name = "shop.abstract"

    function = app.task(base=PooledTask, name="shop.around")(around)
    assert function() == "ran"
    assert app.register_task(Sync())() == "ran"
    app.register_task(Abstract())


# --- declarations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [HttpxClient(), SQLAlchemyEngine("sqlite://")])
def test_an_adapter_without_pools_add(adapter: Any) -> None:
    """It is no client, and never becomes one."""
    with pytest.raises(ConfigurationError, match=r"ShopTask\.api: .*pools\.add\(\w+\(…\)\)"):
        type("ShopTask", (PooledTask,), {"api": adapter})


@pytest.mark.parametrize(
    "engine",
    [
        SQLAlchemyEngine("sqlite://"),
        sqlalchemy.create_engine("sqlite://"),
        SQLAlchemyEngine,
        None,
        "sqlite://",
        lambda: sqlalchemy.create_engine("sqlite://"),
    ],
)
def test_a_session_of_no_resource(engine: Any) -> None:
    """TaskSession wants the resource itself."""
    with pytest.raises(ConfigurationError, match=r"TaskSession\(pools\.add\(SQLAlchemyEngine\(url\)\)\)"):
        TaskSession(engine)


def test_a_session_of_another_resource() -> None:
    """What a function gives is known when it is called."""
    pools = WorkerPools(new_app())

    class ShopTask(PooledTask):
        api = pools.add(HttpxClient())
        session = TaskSession(api)  # type: ignore[arg-type]
        made = pools.add(lambda: sqlalchemy.create_engine("sqlite://"))
        good = TaskSession(made)

    app = new_app()

    @app.task(base=ShopTask, bind=True)
    def bad(self: ShopTask) -> None:
        assert self.session

    @app.task(base=ShopTask, bind=True)
    def good(self: ShopTask) -> int:
        return self.good.scalar(text("SELECT 1")) or 0

    with pytest.raises(ConfigurationError, match=r"'api' is a Client, not a sqlalchemy\.Engine"):
        bad()
    assert good() == 1


def test_a_session_on_a_connection() -> None:
    """A test may override the engine with one connection."""
    pools = WorkerPools(new_app())

    class ShopTask(PooledTask):
        db = pools.add(SQLAlchemyEngine("sqlite://"))
        session = TaskSession(db)

    app = new_app()

    @app.task(base=ShopTask, bind=True)
    def body(self: ShopTask) -> int:
        return self.session.scalar(text("SELECT 1")) or 0

    connection: Any = sqlalchemy.create_engine("sqlite://").connect()
    with connection, ShopTask.db.override(connection):
        assert body() == 1


def test_classes_in_place_of_declarations() -> None:
    """An adapter's class is to be called; another class is no function that should be guessed at."""
    pools = WorkerPools(new_app())
    with pytest.raises(ConfigurationError, match=r"pass an instance: pools\.add\(HttpxClient\(…\)\)"):
        pools.add(HttpxClient)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"not the class Client; .*lambda: Client\(…\)"):
        pools.add(httpx.Client)


def test_urls_that_are_none() -> None:
    """``os.environ.get()`` of a variable that is not set."""
    none: Any = None
    with pytest.raises(ConfigurationError, match="the URL is None"):
        SQLAlchemyEngine(none)
    with pytest.raises(ConfigurationError, match="base_url is None"):
        HttpxClient(base_url=none)


@pytest.mark.parametrize(
    ("option", "meant"),
    [("poolsize", "pool_size"), ("max_overlow", "max_overflow"), ("conect_timeout", "connect_timeout")],
)
def test_misspelt_options_of_the_engine(option: str, meant: str) -> None:
    """Refused where they are written; the right spelling is named."""
    with pytest.raises(ConfigurationError, match=f"no option {option}; did you mean {meant}"):
        SQLAlchemyEngine("sqlite://", **{option: 3})


@pytest.mark.parametrize("option", ["executemany_mode", "pool_events", "fast_executemany", "dialect_of_mine"])
def test_options_that_may_be_a_dialects(option: str) -> None:
    """What is close to no documented name is SQLAlchemy's to judge, which asks the dialect."""
    SQLAlchemyEngine("sqlite://", **{option: 3})


def test_misspelt_options_of_the_session() -> None:
    """All of them are known."""
    engine = WorkerPools(new_app()).add(SQLAlchemyEngine("sqlite://"))
    with pytest.raises(ConfigurationError, match=r"no option expire_on_comit \(did you mean expire_on_commit\?\)"):
        TaskSession(engine, expire_on_comit=False)
    with pytest.raises(ConfigurationError, match=r"no option autocomit$"):
        TaskSession(engine, autocomit=True)
    TaskSession(engine, expire_on_commit=False, autoflush=False)


# --- attempts ------------------------------------------------------------------------------------------------------


def test_a_session_on_a_plain_task() -> None:
    """The base is what makes runs."""
    pools = WorkerPools(new_app())

    class Plain(Task):
        session = TaskSession(pools.add(SQLAlchemyEngine("sqlite://")))

    app = new_app()

    @app.task(base=Plain, bind=True)
    def body(self: Any) -> None:
        assert self.session

    with pytest.raises(NoAttemptError, match="base must be a PooledTask"):
        body()


def test_a_session_that_outlives_its_run(tmp_path: Path) -> None:
    """It refuses every use, and takes no connection: nobody would commit."""
    app, pools = new_app(), WorkerPools()

    class ShopTask(PooledTask):
        db = pools.add(SQLAlchemyEngine(f"sqlite:///{tmp_path}/shop.db", poolclass=sqlalchemy.QueuePool))
        session = TaskSession(db)

    @app.task(base=ShopTask, bind=True)
    def keeps(self: ShopTask, fails: bool = False) -> Session:
        self.session.execute(text("SELECT 1"))
        self.session.close()
        self.session.execute(text("SELECT 2"))  # closing it in the body resets it, as everywhere
        kept.append(self.session)
        if fails:
            raise ZeroDivisionError
        return self.session

    kept: list[Session] = []
    keeps()
    with pytest.raises(ZeroDivisionError):
        keeps(fails=True)
    assert len(set(map(id, kept))) == 2
    for session in kept:
        for _ in range(2):
            for use in (
                lambda s: s.execute(text("SELECT 1")),
                lambda s: s.begin(),
                lambda s: s.connection(),
                lambda s: s.scalars(text("SELECT 1")),
            ):
                with pytest.raises(NoAttemptError, match=r"keeps\.session.*has ended"):
                    use(session)
        session.rollback()
        session.close()
    pool: Any = ShopTask.db.get().pool
    assert pool.checkedout() == 0
    pools.close()


# --- settings ------------------------------------------------------------------------------------------------------

SCRIPT = """
from celery import Celery
from workerpools import DatabaseTask, WorkerPools
app = Celery("mistakes")
app.conf.workerpools_close_timeout = "soon"
pools = WorkerPools(app)
value = pools.add(lambda: 1, name="one")
assert OPEN is False or value.get() == 1
@app.task(base=DatabaseTask)
def sync():
    pass
app.finalize()
"""


@pytest.mark.parametrize("opened", [True, False])
def test_a_broken_setting_is_told_once(opened: bool, tmp_path: Path) -> None:
    """Not again when the process exits."""
    (tmp_path / "script.py").write_text(f"OPEN = {opened}\n{SCRIPT}")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "Exception ignored" not in done.stderr
    assert done.stderr.count("workerpools_close_timeout is 'soon'") == 1


# --- base URLs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base_url",
    ["api.example.com", "//api.example.com", "ftp://api.example.com", "https://", "https:/x", "http://h:port", "/v1"],
)
def test_base_urls_without_a_scheme(base_url: str) -> None:
    """Every request would fail."""
    for given in (base_url, *([] if "port" in base_url else [httpx.URL(base_url)])):
        with pytest.raises(ConfigurationError, match=r"https://api\.example\.com"):
            HttpxClient(base_url=given)


@pytest.mark.parametrize("base_url", ["", "https://api.example.com/v1/", "HTTP://localhost:8080", "http://[::1]:80/"])
def test_good_base_urls(base_url: str) -> None:
    """And none at all."""
    HttpxClient(base_url=base_url)
    HttpxClient(base_url=httpx.URL(base_url))


def test_a_request_without_a_host() -> None:
    """The note does not end in the middle."""
    client = WorkerPools(new_app()).add(HttpxClient(), name="api")
    with client.get() as opened, pytest.raises(httpx.UnsupportedProtocol) as caught:
        opened.get("/orders/7")
    assert notes_of(caught.value) == "workerpools: GET by the resource 'api' to a URL without a host"
