"""What the package offers, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import workerpools
import workerpools.adapter
import workerpools.django
import workerpools.events
import workerpools.failures
import workerpools.flower
import workerpools.httpx
import workerpools.opentelemetry
import workerpools.prometheus
import workerpools.redis
import workerpools.requests
import workerpools.sqlalchemy
import workerpools.testing
from tests.support.paths import environment


def test_exported_members() -> None:
    """The root's names are pinned: a new one changes this test, a page of the documentation and the changelog."""
    assert workerpools.__all__ == [
        "Adapter",
        "ConfigurationError",
        "DatabaseTask",
        "Deadline",
        "DeadlineExceeded",
        "Failure",
        "FailureKind",
        "HTTPTask",
        "NoAttemptError",
        "OpenTimeoutError",
        "PooledTask",
        "Resource",
        "RetryPolicy",
        "WorkerPools",
        "WorkerPoolsError",
        "check",
        "classify",
    ]
    assert workerpools.adapter.__all__ == [
        "UNKNOWN",
        "WEEK",
        "YEAR",
        "Adapter",
        "Attempt",
        "Deadline",
        "Descriptors",
        "Due",
        "Effect",
        "ExecutionPool",
        "Factory",
        "Failure",
        "FailureKind",
        "FunctionAdapter",
        "Lease",
        "Lifetime",
        "Limit",
        "Opening",
        "Overridable",
        "Phase",
        "Resource",
        "Scoped",
        "Sent",
        "Setting",
        "SocketNumber",
        "Watch",
        "Watchdog",
        "add_note",
        "causes",
        "current",
        "deadline",
        "due",
        "explained",
        "failure_of",
        "flow",
        "greenlet_library",
        "greenlet_time_limit",
        "in_attempt",
        "kept_key",
        "loop_is_running",
        "meant",
        "note_effect",
        "on_commit",
        "on_loop",
        "redact_url",
        "refusal",
        "require",
        "retry_after",
        "run_coroutine",
        "scoped",
        "seconds",
        "sql_limits",
        "start_coroutine",
        "whole",
    ]
    assert workerpools.django.__all__ == ["DjangoTask"]
    assert workerpools.events.__all__ == ["Alert", "AlertListener", "Event", "EventKind", "Listener"]
    assert workerpools.httpx.__all__ == [
        "DEFAULT_TIMEOUT",
        "AsyncHttpxClient",
        "HttpxClient",
        "classify",
        "default_limits",
    ]
    assert workerpools.failures.__all__ == ["Failure", "FailureKind", "Phase", "Sent", "classify"]
    assert workerpools.opentelemetry.__all__ == ["instrument", "uninstrument"]
    assert workerpools.prometheus.__all__ == ["Source", "WorkerPoolsCollector", "register", "serve"]
    assert workerpools.requests.__all__ == ["RequestsSession", "classify"]
    assert workerpools.flower.__all__ == ["install"]
    assert workerpools.redis.__all__ == ["AsyncRedisClient", "RedisClient"]
    assert workerpools.sqlalchemy.__all__ == [
        "AsyncSQLAlchemyEngine",
        "AsyncTaskSession",
        "SQLAlchemyEngine",
        "TaskSession",
        "classify",
        "connect_defaults",
        "current_session",
        "pool_defaults",
    ]
    assert workerpools.testing.__all__ == ["AdapterContract", "TcpProxy", "run_attempt"]
    modules = (
        workerpools,
        workerpools.adapter,
        workerpools.django,
        workerpools.events,
        workerpools.failures,
        workerpools.flower,
        workerpools.httpx,
        workerpools.opentelemetry,
        workerpools.prometheus,
        workerpools.redis,
        workerpools.requests,
        workerpools.sqlalchemy,
        workerpools.testing,
    )
    for module in modules:
        assert all(hasattr(module, name) for name in module.__all__)


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_importing_loads_no_client_library() -> None:
    """``import workerpools`` imports neither httpx nor SQLAlchemy, redis or requests, nor pytest."""
    loaded = run(
        "import workerpools, sys; print({'httpx', 'httpcore', 'sqlalchemy', 'psycopg2', 'redis', 'requests', 'pytest'}"
        " & set(sys.modules), 'django.db' in sys.modules)"
    )
    assert loaded.strip() == "set() False"


def test_importing_does_nothing() -> None:
    """Importing opens no file or socket, starts no thread, and registers neither fork hooks nor exit functions."""
    did = run(
        """
import os, sys, threading, celery, celery.app.task, celery.signals, celery.app.base
celery.Task, celery.Celery, celery.current_app
happened = []
fds = len(os.listdir('/proc/self/fd')) if os.path.exists('/proc/self/fd') else 0
os.register_at_fork = lambda **hooks: happened.append('register_at_fork')
import atexit
atexit.register = lambda *a, **k: happened.append('atexit')
receivers = sum(len(s.receivers or ()) for s in vars(celery.signals).values() if hasattr(s, 'receivers'))
import workerpools
assert receivers == sum(len(s.receivers or ()) for s in vars(celery.signals).values() if hasattr(s, 'receivers'))
assert threading.active_count() == 1
assert not fds or fds == len(os.listdir('/proc/self/fd'))
print(happened)
"""
    )
    assert did.strip() == "[]"
