"""What the app's settings and its tasks' options say, and whether a worker does it."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from typing import Any

from celery import Task, signals
from celery.app import utils as celery_utils

from workerpools._celery import apps
from workerpools._celery.task import PooledTask
from workerpools._check import probing
from workerpools._check.asked import Asked
from workerpools._check.findings import Code, Finding
from workerpools._check.own import is_own
from workerpools._pools.resource import Resource
from workerpools._run.delivery import RetryPolicy

__all__ = ["CODES", "check"]

UNENFORCED = Code(
    "WP301",
    "warning",
    "Time limits that this execution pool does not enforce",
    "threads, solo and eventlet enforce no limits, and gevent only the hard one: a task that hangs keeps its thread "
    "for ever. In a PooledTask, waits for connections still end at the limit.",
    "Use prefork, or give every wait in the body a timeout.",
    'app.conf.update(worker_pool="threads", task_time_limit=60)',
)
SOFT_LIMIT = Code(
    "WP302",
    "warning",
    "A soft time limit that comes too late",
    "The hard limit kills the process first: the body cannot clean up, and no pool closes its connections.",
    "Set the soft limit some seconds below the hard one.",
    "@app.task(time_limit=60, soft_time_limit=60)",
)
VISIBILITY = Code(
    "WP303",
    "warning",
    "A task may run longer than its message stays invisible",
    "With acks_late the broker delivers the message again after the visibility timeout, while the first run "
    "continues: the task runs twice at the same time.",
    "Set visibility_timeout in broker_transport_options above the longest hard time limit.",
    '@app.task(acks_late=True, time_limit=7200)  # with broker_url="redis://…": one hour',
)
ETA = Code(
    "WP304",
    "warning",
    "A retry may wait longer than its message stays invisible",
    "The worker holds a message with a countdown unacknowledged; after the visibility timeout the broker delivers it "
    "to another one, and both run it.",
    "Set visibility_timeout in broker_transport_options above the longest delay, or shorten the delay.",
    '@app.task(default_retry_delay=2 * 3600)  # with broker_url="redis://…": one hour',
)
STATEMENTS = Code(
    "WP305",
    "hint",
    "Nothing here bounds a statement",
    "A statement may wait for a lock, or for a server that vanished silently, for ever. A task's time limit bounds "
    "its statements; these tasks have none.",
    "Give the tasks a time limit, or set a statement_timeout in connect_args or for the role.",
    "db = pools.add(SQLAlchemyEngine(url))  # and tasks without a time limit",
)
KEEP_ALIVE = Code(
    "WP306",
    "warning",
    "Connections are kept longer than the server keeps them",
    "A request sent while the server closes is lost; a POST then fails, because nobody knows whether it was processed.",
    "Keep idle connections for less time: limits=httpx.Limits(keepalive_expiry=…), or max_idle=… of RequestsSession.",
    "api = pools.add(HttpxClient(base_url=URL, limits=httpx.Limits(max_connections=10, keepalive_expiry=60)))",
)
UNREACHABLE = Code(
    "WP307",
    "hint",
    "A server could not be probed",
    "Its keep-alive time is not known.",
    "Run the check where the workers run.",
    "celery -A shop pools check --probe",
)
SPAWN = Code(
    "WP308",
    "warning",
    "Children are spawned, and miss what worker_init does",
    "A spawned child imports the modules again and never gets worker_init or celeryd_init: what their receivers set "
    "up is missing.",
    "Do it in worker_process_init, or on first use.",
    'app.conf.worker_pool_start_method = "spawn"\n\n@worker_init.connect\ndef set_up(**kwargs):\n    …',
)
SECRET = Code(
    "WP309",
    "warning",
    "A password in a setting that Celery shows",
    "celery report, inspect conf and Flower show the settings; Celery hides those with words such as PASSWORD, TOKEN, "
    "KEY or SECRET in their name.",
    "Rename the setting, or read the password from the environment where it is used.",
    'app.conf.warehouse_uri = "postgresql://app:secret@db/warehouse"',
)
CODES = (UNENFORCED, SOFT_LIMIT, VISIBILITY, ETA, STATEMENTS, KEEP_ALIVE, UNREACHABLE, SPAWN, SECRET)

#: The transports that deliver a message again, and after how long by default, in seconds (kombu).
_VISIBILITY = {"redis": 3600.0, "rediss": 3600.0, "sentinel": 3600.0, "sqs": 1800.0}
_SHOWN = 5
_PASSWORD = re.compile(r"://(?:[^\s/:@'\"]*:(?P<password>[^\s/@'\"]+)|(?P<token>[^\s/:@'\"]{16,}))@")


def check(asked: Asked) -> list[Finding]:
    """Return what is wrong with the settings."""
    app = asked.app
    tasks = [task for name, task in sorted(app.tasks.items()) if not name.startswith("celery.")]
    found = [*_limits(app, tasks), *_redelivered(app, tasks), *_unbounded(app, tasks), *_spawned(app), *_secrets(app)]
    if asked.probe:
        found += _probed(app)
    return found


def _names(tasks: list[Any]) -> str:
    names = [task.name for task in tasks]
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _of(app: Any, task: Any) -> tuple[float | None, float | None]:
    """Return a task's hard and soft time limit, in seconds."""
    return task.time_limit or app.conf.task_time_limit, task.soft_time_limit or app.conf.task_soft_time_limit


def _limits(app: Any, tasks: list[Any]) -> Iterator[Finding]:
    pool = str(app.conf.worker_pool).rpartition(":")[0].rpartition(".")[2] or str(app.conf.worker_pool)
    if pool in ("threads", "thread", "solo", "eventlet", "gevent"):
        limited = [task for task in tasks if _of(app, task)[1] or (pool != "gevent" and _of(app, task)[0])]
        if limited:
            kind = "no soft time limits" if pool == "gevent" else "no time limits"
            yield UNENFORCED.at("worker_pool", f"{pool} enforces {kind}, which these tasks have: {_names(limited)}")
    for task in tasks:
        hard, soft = _of(app, task)
        if hard and soft and soft >= hard:
            yield SOFT_LIMIT.at(task.name, f"the soft limit of {soft:g} s is not below the hard one of {hard:g} s")


def _redelivered(app: Any, tasks: list[Any]) -> Iterator[Finding]:
    transport = str(app.conf.broker_url or "").partition("://")[0].partition("+")[0].lower()
    if transport not in _VISIBILITY:
        return
    visible = float((app.conf.broker_transport_options or {}).get("visibility_timeout") or _VISIBILITY[transport])
    for task in tasks:
        hard = _of(app, task)[0]
        if task.acks_late and hard and hard >= visible:
            what = f"acks_late with a time limit of {hard:g} s; the visibility timeout is {visible:g} s"
            yield VISIBILITY.at(task.name, what)
        name, delay = max(_delays(task), key=lambda each: each[1], default=("", 0.0))
        if delay >= visible:
            yield ETA.at(task.name, f"{name} is {delay:g} s; the visibility timeout is {visible:g} s")


def _delays(task: Any) -> Iterator[tuple[str, float]]:
    """Yield the longest delays of a task's retries, in seconds, each with its option."""
    # Celery's own default is that of tasks that never retry, too.
    if task.default_retry_delay != Task.default_retry_delay:
        yield "default_retry_delay", float(task.default_retry_delay or 0)
    if getattr(task, "autoretry_for", ()) and getattr(task, "retry_backoff", False):
        # celery.app.autoretry: the factor is doubled with each retry, up to the maximum.
        most = float(getattr(task, "retry_backoff_max", 600))
        reached = float(int(max(1.0, task.retry_backoff)) * 2 ** min(task.max_retries or 1_000, 60))
        yield "retry_backoff", min(most, reached)
    policy = RetryPolicy.of(task.replay, str(task.name)) if isinstance(task, PooledTask) else None
    if policy is not None:
        yield "backoff_max", policy.backoff_max


def _unbounded(app: Any, tasks: list[Any]) -> Iterator[Finding]:
    users: dict[Any, list[Any]] = {}
    for task in tasks:
        for class_ in type(task).__mro__:
            for value in vars(class_).values():
                if isinstance(value, Resource) and not any(_of(app, task)):
                    users.setdefault(value, []).append(task)
    for resource, unlimited in users.items():
        if getattr(resource.adapter, "bounds_statements", None) is False:
            what = f"no statement_timeout, and these tasks have no time limit: {_names(unlimited)}"
            yield STATEMENTS.at(f"the resource {resource.name}", what)


def _spawned(app: Any) -> Iterator[Finding]:
    if getattr(app.conf, "worker_pool_start_method", None) != "spawn":
        return
    for signal in (signals.worker_init, signals.celeryd_init):
        for _, reference in signal.receivers or ():
            # Strong references are the receivers themselves.
            receiver = reference() if type(reference).__name__ in ("ReferenceType", "WeakMethod") else reference
            name = getattr(receiver, "__module__", "") or ""
            if is_own(name, getattr(sys.modules.get(name), "__file__", None)):
                code = getattr(receiver, "__qualname__", repr(receiver))
                yield SPAWN.at(f"{name}.{code}", f"receives {signal.name}, and children are spawned")


def _secrets(app: Any) -> Iterator[Finding]:
    # Ours are hidden whatever their name.
    for key, value in sorted(app.conf.table(with_defaults=False, censored=False).items()):
        passwords = [match["password"] or match["token"] for match in _PASSWORD.finditer(repr(value))]
        if not passwords:
            continue
        shown = repr(celery_utils.filter_hidden_settings({key: value}))
        if any(password in shown for password in passwords):
            yield SECRET.at(key, "has a URL with a password")


def _probed(app: Any) -> Iterator[Finding]:
    for resource in (each for pools in apps.all_of(app) for each in pools.resources):
        adapter = resource.adapter
        expiry = getattr(adapter, "keepalive_expiry", None)
        if adapter.kind != "http" or adapter.server is None or expiry is None:
            continue
        host, port = adapter.server
        where = f"the resource {resource.name}"
        try:
            kept = probing.idle_time(host, port, "https://" in adapter.describe(), expiry)
        except OSError as error:
            yield UNREACHABLE.at(where, f"{host}:{port}: {error}")
            continue
        if kept is not None:
            ours = "for ever" if math.isinf(expiry) else f"for {expiry:g} s"
            yield KEEP_ALIVE.at(where, f"{host}:{port} closes after {kept:.1f} s; the client keeps connections {ours}")
