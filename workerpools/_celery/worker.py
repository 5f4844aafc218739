"""What runs in a worker's main process: it shows the connection pools, recycles them, raises alerts, serves metrics.

Celery makes the three bootsteps with each worker of the app; remote control (``celery inspect pools`` and ``celery
control pools_recycle``) is known to the process.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

from celery import bootsteps, signals
from celery.worker.control import Panel, control_command, inspect_command

from workerpools._celery import apps
from workerpools._celery.lifecycle import execution_pool
from workerpools._celery.settings import read_setting, read_settings
from workerpools._celery.sharing import children
from workerpools._run.events import ALERTS
from workerpools._stats.alerts import Monitor
from workerpools._stats.metrics import FIRST
from workerpools._stats.rules import Thresholds
from workerpools._stats.snapshot import Alert, ResourceStats, WorkerStats
from workerpools.errors import ConfigurationError

__all__ = [
    "ALERT_INTERVAL",
    "EVENT",
    "KEY",
    "METRICS_HOST",
    "STEPS",
    "AlertsStep",
    "MetricsStep",
    "PoolsStep",
    "readable",
    "register_commands",
    "snapshots",
]

#: The key in the reply of ``celery inspect stats``.
KEY = "workerpools"

#: The type of an alert's event. Its prefix is ours alone: Flower and Celery take ``worker-`` and ``task-`` for states
#: of theirs.
EVENT = "pools-alert"

#: How often alerts are looked for, in seconds, unless the settings say otherwise.
ALERT_INTERVAL = 5.0

#: Without a setting, metrics are served to this machine alone: there is neither a password nor TLS.
METRICS_HOST = "127.0.0.1"

logger = logging.getLogger("workerpools")
alert_logger = logging.getLogger(ALERTS)

_OPEN, _IN_USE, _PENDING = FIRST["open"], FIRST["in_use"], FIRST["pending"]
_OPENED, _REUSED, _TIMEOUTS = FIRST["opened"], FIRST["reused"], FIRST["acquire_timeouts"]


def snapshots(app: Any, worker: Any) -> list[WorkerStats]:
    """Return a snapshot of each WorkerPools of ``app``.

    Args:
        app: The Celery app.
        worker: Its worker in this process; None outside of one.
    """
    living = None if worker is None else children(worker)
    return [pools.collector.snapshot(living) for pools in apps.all_of(app)]


class PoolsStep(bootsteps.StartStopStep):
    """Adds the connection pools to what the worker says of itself; starts nothing."""

    def info(self, worker: Any) -> dict[str, Any]:
        stats = snapshots(worker.app, worker)
        return {KEY: {**readable(stats), "snapshots": [each.to_dict() for each in stats]}}


def readable(stats: list[WorkerStats]) -> dict[str, Any]:
    """Return snapshots as a person reads them in ``celery inspect stats`` or on Flower's page of a worker.

    One short text for each resource of the worker, and one for each of its processes.
    """
    resources: dict[str, str] = {}
    processes: dict[str, dict[str, str]] = {}
    for worker in stats:
        resources.update({each.name: _line(each) for each in worker.totals()})
        for process in worker.processes:
            processes.setdefault(str(process.pid), {}).update({each.name: _line(each) for each in process.resources})
    alerts = [f"{alert.rule}: {alert.message}" for each in stats for alert in each.alerts]
    unseen = max((each.unseen for each in stats), default=0)
    return {"resources": resources, "processes": processes, "alerts": alerts, "unseen": unseen}


def _line(stats: ResourceStats) -> str:
    row = stats.row
    limit = f"/{stats.limit}" if stats.limit else ""
    text = (
        f"open {row[_OPEN]:.0f}{limit}, in use {row[_IN_USE]:.0f}, pending {row[_PENDING]:.0f}; "
        f"opened {row[_OPENED]:.0f}, reused {row[_REUSED]:.0f}; "
        f"longest wait {stats.longest_wait_so_far:.3f} s, timed out {row[_TIMEOUTS]:.0f}"
    )
    troubles = [(name, stats.value(name)) for name in ("failures", "replays", "retries", "refused_replays", "leaks")]
    told = ", ".join(f"{name.replace('_', ' ')} {count:.0f}" for name, count in troubles if count)
    return f"{text}; {told}" if told else text


def register_commands() -> None:
    """Have this process know ``celery inspect pools`` and ``celery control pools_recycle``."""
    if "pools" not in Panel.data:
        inspect_command(name="pools")(_inspect_pools)
        control_command(name="pools_recycle", args=[("name", str)], signature="[NAME]")(_recycle)


def _inspect_pools(state: Any, **_: Any) -> list[dict[str, Any]]:
    """Show what the connection pools of each of the worker's processes are doing."""
    return [each.to_dict() for each in snapshots(state.app, state.consumer.controller)]


def _recycle(state: Any, name: str | None = None, **_: Any) -> dict[str, Any]:
    """Have each process replace its connections at its next use: of one resource, or of all."""
    recycled: set[str] = set()
    for pools in apps.all_of(state.app):
        # Another WorkerPools of the app may have a resource of that name.
        with contextlib.suppress(ConfigurationError):
            recycled.update(pools.recycle(name))
    if name is not None and not recycled:
        known = {each for pools in apps.all_of(state.app) for each in pools.collector.names()}
        return {"error": f"no resource is named {name!r}", "resources": sorted(known)}
    return {"ok": "connections are replaced when they are used next", "resources": sorted(recycled)}


class AlertsStep(bootsteps.StartStopStep):
    """Looks for the alerts of the app's connection pools as long as its worker runs, and sends them as Celery events.

    The worker's timer runs in the main loop (prefork and threads with a broker that has an event loop, as Redis and
    RabbitMQ), in a greenlet, or in Celery's own timer thread. That is the right place in every execution pool but solo:
    there a task occupies the main loop, so a thread looks. No other execution pool gets one: a prefork parent forks,
    and a lock that another thread holds at that moment stays locked in the child.
    """

    requires = ("celery.worker.components:Timer", "celery.worker.components:Pool")

    def __init__(self, worker: Any, **options: Any) -> None:
        self._cancel: Callable[[], object] = _nothing
        self._monitors: dict[int, tuple[Any, Monitor]] = {}
        self._thresholds = Thresholds()
        self._failure = ""
        super().__init__(worker, **options)

    def start(self, worker: Any) -> None:
        settings = read_settings(worker.app.conf)
        interval = settings.get("alert_interval", ALERT_INTERVAL)
        if interval <= 0:
            return
        self._thresholds = Thresholds(
            **{
                name: settings[f"alert_{name}"]
                for name in Thresholds.__dataclass_fields__
                if f"alert_{name}" in settings
            }
        )
        # Before the first task: what is counted from here on is news.
        self.look(worker)
        if execution_pool(worker).kind == "solo":
            self._cancel = _in_a_thread(interval, lambda: self.look(worker))
        else:
            self._cancel = worker.timer.call_repeatedly(interval, self.look, (worker,)).cancel

    def stop(self, worker: Any) -> None:
        self._cancel()
        self._cancel = _nothing

    def close(self, worker: Any) -> None:
        self.stop(worker)

    def terminate(self, worker: Any) -> None:
        self.stop(worker)

    def look(self, worker: Any) -> None:
        """Look once. Never raises; a failure is logged when it is another one than before."""
        try:
            living = children(worker)
            for pools in apps.all_of(worker.app):
                if id(pools) not in self._monitors:
                    self._monitors[id(pools)] = pools, monitor_of(pools, self._thresholds)
                _, monitor = self._monitors[id(pools)]
                for alert, raised in monitor.look(living):
                    _send(worker, alert, raised)
            self._failure = ""
        except Exception as error:
            if (failure := repr(error)) != self._failure:
                self._failure = failure
                alert_logger.exception("alerts could not be looked for; it is tried again")


def monitor_of(pools: Any, thresholds: Thresholds) -> Monitor:
    """Return a monitor of the statistics of a WorkerPools, for its listeners."""
    return Monitor(
        pools.collector,
        thresholds,
        leak_after=lambda: {each.name: after for each in pools.resources if (after := each.leak_after) is not None},
        listeners=lambda: pools.alert_listeners,
    )


def _nothing() -> None:
    pass


def _in_a_thread(interval: float, look: Callable[[], object]) -> Callable[[], object]:
    over = threading.Event()

    def run() -> None:
        while not over.wait(interval):
            look()

    threading.Thread(target=run, name="workerpools-alerts", daemon=True).start()
    return over.set


def _send(worker: Any, alert: Alert, raised: bool) -> None:
    def send() -> None:
        # Looked up now: a lost connection to the broker brings another one.
        dispatcher = getattr(getattr(worker, "consumer", None), "event_dispatcher", None)
        if dispatcher is None:
            return
        told = alert.to_dict()
        # Every event has a ``pid`` already, the worker's.
        told["process"] = told.pop("pid")
        try:
            dispatcher.send(EVENT, state="raised" if raised else "cleared", **told)
        except Exception:
            alert_logger.warning("the alert %s was not sent as an event", alert.rule, exc_info=True)

    hub = getattr(worker, "hub", None)
    if hub is not None and threading.current_thread() is not threading.main_thread():
        # Its connection is the main loop's.
        hub.call_soon(send)
    else:
        send()


class MetricsStep(bootsteps.StartStopStep):
    """Serves statistics to Prometheus, where a port is configured.

    The endpoint starts after the execution pool, and stays until the last task of a warm stop has ended.
    """

    # The thread need not exist when the first children are forked. Later ones discard its sockets.
    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **_: Any) -> None:
        self._endpoint: Any = None
        self._worker: Any = None
        self._uid = f"workerpools-metrics-{id(self)}"

    def start(self, worker: Any) -> None:
        port = read_setting(worker.app.conf, "metrics_port", None)
        if port is None or self._endpoint is not None:
            return
        host = read_setting(worker.app.conf, "metrics_host", METRICS_HOST)
        try:
            # By its name: the core of the package does not depend on its integrations.
            prometheus = import_module("workerpools.prometheus")
            endpoint = prometheus.serve(lambda: {worker.hostname: snapshots(worker.app, worker)}, host, port)
        except ImportError as error:
            logger.error(
                "workerpools_metrics_port is set, but the worker's statistics are not served: %s",
                error,
            )
        except OSError as error:
            logger.error(
                "the worker's statistics are not served: workerpools_metrics_host %s and workerpools_metrics_port %d "
                "cannot be listened on: %s; each worker of a machine needs a port of its own",
                host,
                port,
                error.strerror or error,
            )
        else:
            logger.info("the worker's statistics are served at http://%s:%d/metrics", host, endpoint.port)
            self._endpoint, self._worker = endpoint, worker
            signals.worker_shutdown.connect(self._worker_ended, weak=False, dispatch_uid=self._uid)

    def stop(self, worker: Any) -> None:
        """Do nothing: the tasks that a warm stop waits for are to be seen."""

    def terminate(self, worker: Any) -> None:
        self._close()

    def _worker_ended(self, sender: Any = None, **_: Any) -> None:
        # Of a worker that tells who it is, another app's in this process is of no interest.
        if sender is self._worker or not hasattr(sender, "app"):
            self._close()

    def _close(self) -> None:
        endpoint, self._endpoint = self._endpoint, None
        self._worker = None
        signals.worker_shutdown.disconnect(dispatch_uid=self._uid)
        if endpoint is not None:
            endpoint.close()


#: The bootsteps of each worker.
STEPS = (PoolsStep, AlertsStep, MetricsStep)
