"""What the settings and the tasks' options say, and the one check that connects."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from celery import Celery, signals

import workerpools
from demo_tasks.app import app as demo
from tests.support.upstream import EchoUpstream
from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools._check import settings
from workerpools._check.asked import Asked
from workerpools._check.codes import ALL
from workerpools.httpx import HttpxClient
from workerpools.requests import RequestsSession
from workerpools.sqlalchemy import SQLAlchemyEngine

REDIS = {"broker_url": "redis://localhost/0"}


def body() -> None:
    """Do nothing."""


def found(app: Celery, *, probe: bool = False) -> list[tuple[str, str]]:
    """The code and the place of each finding in the settings."""
    app.finalize()
    return [(each.code, each.where) for each in settings.check(Asked(app, probe, ALL))]


def app_with(conf: dict[str, Any], **options: Any) -> Celery:
    """An app with one task, ``t``."""
    app = Celery("made", set_as_current=False)
    app.conf.update(conf)
    app.task(shared=False, name="t", **options)(body)
    return app


@pytest.mark.parametrize(
    ("conf", "options", "code"),
    [
        ({"worker_pool": "threads", "task_time_limit": 9}, {}, ("WP301", "worker_pool")),
        ({"worker_pool": "celery.concurrency.solo:TaskPool"}, {"time_limit": 9}, ("WP301", "worker_pool")),
        ({"worker_pool": "gevent", "task_soft_time_limit": 9}, {}, ("WP301", "worker_pool")),
        ({"worker_pool": "gevent", "task_time_limit": 9}, {}, None),
        ({"worker_pool": "threads"}, {}, None),
        ({"task_time_limit": 9}, {}, None),
        ({"task_soft_time_limit": 9}, {"time_limit": 9}, ("WP302", "t")),
        ({"task_soft_time_limit": 8}, {"time_limit": 9}, None),
        (REDIS, {"acks_late": True, "time_limit": 3600}, ("WP303", "t")),
        (REDIS, {"acks_late": True, "time_limit": 3599}, None),
        (REDIS, {"time_limit": 3600}, None),
        ({"broker_url": "amqp://h"}, {"acks_late": True, "time_limit": 3600}, None),
        (
            {**REDIS, "broker_transport_options": {"visibility_timeout": 60}},
            {"acks_late": True, "time_limit": 60},
            ("WP303", "t"),
        ),
        (REDIS, {"default_retry_delay": 3600}, ("WP304", "t")),
        (
            REDIS,
            {"autoretry_for": (KeyError,), "retry_backoff": 1800, "retry_backoff_max": 7200, "max_retries": 3},
            ("WP304", "t"),
        ),
        (
            REDIS,
            {"autoretry_for": (KeyError,), "retry_backoff": 2, "retry_backoff_max": 7200, "max_retries": 3},
            None,
        ),
        (REDIS, {"base": PooledTask, "replay": RetryPolicy(backoff_max=3600)}, ("WP304", "t")),
        ({"warehouse_uri": "postgresql://app:s3cret@db/x"}, {}, ("WP309", "warehouse_uri")),
        ({"sentry_dsn": "https://0123456789abcdef@sentry.io/1"}, {}, ("WP309", "sentry_dsn")),
        ({"cache_servers": ["redis://:s3cret@one"]}, {}, ("WP309", "cache_servers")),
        ({"warehouse_uri": "postgresql://app@db/x"}, {}, None),
        ({"warehouse_password": "postgresql://app:s3cret@db/x"}, {}, None),
        ({"broker_url": "redis://:s3cret@h/0", "result_backend": "redis://:s3cret@h/0"}, {}, None),
        ({"workerpools_http_base_url": "https://app:s3cret@h"}, {}, None),
    ],
)
def test_each_setting(conf: dict[str, Any], options: dict[str, Any], code: tuple[str, str] | None) -> None:
    """Found where it is wrong, and not one step before."""
    WorkerPools()
    assert found(app_with(conf, **options)) == ([] if code is None else [code])


@pytest.mark.parametrize(
    ("url", "options", "limit", "hint"),
    [
        ("postgresql+psycopg2://h/x", {}, None, True),
        ("postgresql+psycopg2://h/x", {}, 30, False),
        ("postgresql+psycopg://h/x?options=-c%20statement_timeout%3D30s", {}, None, False),
        ("postgresql+psycopg2://h/x", {"connect_args": {"options": "-c statement_timeout=9s"}}, None, False),
        # It may do anything.
        ("postgresql+psycopg2://h/x", {"on_open": print}, None, False),
        ("sqlite://", {}, None, False),
    ],
)
def test_statements_without_a_bound(url: str, options: dict[str, Any], limit: int | None, hint: bool) -> None:
    """A time limit's deadline bounds them, too."""
    app = Celery("made", set_as_current=False)
    pools = WorkerPools(app)

    class Base(PooledTask):
        db = pools.add(SQLAlchemyEngine(url, **options))

    app.task(shared=False, base=Base, name="t", time_limit=limit)(body)
    assert found(app) == ([("WP305", "the resource db")] if hint else [])


def test_spawned_children_miss_what_worker_init_does() -> None:
    """A receiver of the user's own module; ours and Celery's are known to work."""
    app = app_with({"worker_pool_start_method": "spawn"})
    assert found(app) == []

    def set_up(**_: object) -> None:
        pass

    signals.worker_init.connect(set_up)
    try:
        ((code, where),) = found(app)
        assert code == "WP308"
        assert where.endswith("set_up")
        assert found(app_with({})) == []
    finally:
        signals.worker_init.disconnect(set_up)


@pytest.fixture
def accepted() -> Iterator[tuple[str, list[object]]]:
    """The URL of a server that never answers, and what it has accepted."""
    connections: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connections.append(server.accept())
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", connections
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def test_nothing_connects_unless_it_may(accepted: tuple[str, list[object]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Broker, database and API are one server here, which counts; with ``probe`` the API alone is asked, once."""
    from workerpools._check import probing

    address, connections = accepted
    app = app_with({"broker_url": f"redis://{address}/0", "result_backend": f"redis://{address}/0"})
    pools = WorkerPools(app)
    pools.add(HttpxClient(base_url=f"http://{address}"), name="api")
    pools.add(SQLAlchemyEngine(f"postgresql+psycopg2://{address}/x"), name="db")
    assert [each.code for each in workerpools.check(app)] == ["WP112"]
    assert connections == []
    monkeypatch.setattr(probing, "TIMEOUT", 0.2)
    assert found(app, probe=True) == [("WP307", "the resource api")]
    assert len(connections) == 1


@pytest.mark.parametrize(
    ("adapter", "longer"),
    [
        (lambda url: HttpxClient(base_url=url), True),
        (lambda url: HttpxClient(base_url=url, limits=httpx.Limits(max_connections=1, keepalive_expiry=0.1)), False),
        (lambda url: HttpxClient(base_url=url, limits=httpx.Limits(max_connections=1, keepalive_expiry=None)), True),
        (lambda url: RequestsSession(url), True),
        (lambda url: RequestsSession(url, max_idle=0.1), False),
        # Whose server is known to nobody, or whose connections are somebody else's.
        (lambda url: HttpxClient(), False),
        (lambda url: HttpxClient(base_url=url, transport=httpx.MockTransport(lambda _: httpx.Response(200))), False),
    ],
)
def test_keep_alive_times_are_compared(adapter: Callable[[str], Any], longer: bool) -> None:
    """The server closes idle connections after 0.3 s, without a header that says so."""
    app = Celery("made", set_as_current=False)
    pools = WorkerPools(app)
    with EchoUpstream(keep_alive=0.3) as echo:
        pools.add(adapter(echo.url), name="api")
        assert found(app, probe=True) == ([("WP306", "the resource api")] if longer else [])


def test_the_demo_is_clean() -> None:
    """Nothing is found in it, hints included."""
    assert workerpools.check(demo) == []
