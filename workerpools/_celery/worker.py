"""The worker's main process: statistics, recycling, alerts, and the endpoint for metrics and probes.

The three bootsteps are created with each worker of the app; the remote control commands (``celery inspect pools`` and
``celery control pools_recycle``) are registered once per process.
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
from workerpools._celery.health import Health
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

#: The event type of alerts. Its prefix is unique: Flower and Celery treat ``worker-`` and ``task-`` as their states.
EVENT = "pools-alert"

#: The default time between two alert checks, in seconds.
ALERT_INTERVAL = 5.0

#: By default the metrics endpoint is reachable from this machine only: it has no password and no TLS.
METRICS_HOST = "127.0.0.1"

logger = logging.getLogger("workerpools")
alert_logger = logging.getLogger(ALERTS)

_OPEN, _IN_USE, _PENDING = FIRST["open"], FIRST["in_use"], FIRST["pending"]
_OPENED, _REUSED, _TIMEOUTS = FIRST["opened"], FIRST["reused"], FIRST["acquire_timeouts"]


def snapshots(app: Any, worker: Any) -> list[WorkerStats]:
    """Return a snapshot of each WorkerPools of ``app``.

    Args:
        app: The Celery app.
        worker: Its worker in this process; None without one.
    """
    living = None if worker is None else children(worker)
    return [pools.collector.snapshot(living) for pools in apps.all_of(app)]


class PoolsStep(bootsteps.StartStopStep):
    """Adds the connection pools to the worker's ``inspect stats`` reply; starts nothing."""

    def info(self, worker: Any) -> dict[str, Any]:
        stats = snapshots(worker.app, worker)
        return {KEY: {**readable(stats), "snapshots": [each.to_dict() for each in stats]}}


def readable(stats: list[WorkerStats]) -> dict[str, Any]:
    """Return snapshots in readable form, for ``celery inspect stats`` and Flower's worker page.

    One short text per resource of the worker, and one per resource and process.
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
    counts = ", ".join(f"{name.replace('_', ' ')} {count:.0f}" for name, count in troubles if count)
    return f"{text}; {counts}" if counts else text


def register_commands() -> None:
    """Register ``celery inspect pools`` and ``celery control pools_recycle`` in this process."""
    if "pools" not in Panel.data:
        inspect_command(name="pools")(_inspect_pools)
        control_command(name="pools_recycle", args=[("name", str)], signature="[NAME]")(_recycle)


def _inspect_pools(state: Any, **_: Any) -> list[dict[str, Any]]:
    """Show the connection pools of each of the worker's processes."""
    return [each.to_dict() for each in snapshots(state.app, state.consumer.controller)]


def _recycle(state: Any, name: str | None = None, **_: Any) -> dict[str, Any]:
    """Replace the connections of one resource, or of all, in each process on next use."""
    recycled: set[str] = set()
    for pools in apps.all_of(state.app):
        # The resource may belong to another WorkerPools of the app.
        with contextlib.suppress(ConfigurationError):
            recycled.update(pools.recycle(name))
    if name is not None and not recycled:
        known = {each for pools in apps.all_of(state.app) for each in pools.collector.names()}
        return {"error": f"no resource is named {name!r}", "resources": sorted(known)}
    return {"ok": "connections will be replaced on next use", "resources": sorted(recycled)}


class AlertsStep(bootsteps.StartStopStep):
    """Checks the app's connection pools for alerts while the worker runs, and sends alerts as Celery events.

    The worker's timer runs in the main loop (prefork and threads with a broker that has an event loop, such as Redis
    and RabbitMQ), in a greenlet, or in Celery's own timer thread. That suits every execution pool but solo, where a
    task occupies the main loop: there a thread checks. No other execution pool gets one: a prefork parent forks, and a
    lock that another thread holds at that moment stays locked in the child.
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
        # Take the baseline before the first task.
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
        """Check once. Never raises; logs a failure unless it repeats the previous one."""
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
                alert_logger.exception("alert check failed; it will be retried")


def monitor_of(pools: Any, thresholds: Thresholds) -> Monitor:
    """Return a monitor of a WorkerPools' statistics that calls its alert listeners."""
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
        # Looked up each time: reconnecting to the broker creates a new dispatcher.
        dispatcher = getattr(getattr(worker, "consumer", None), "event_dispatcher", None)
        if dispatcher is None:
            return
        fields = alert.to_dict()
        # Every event already has a ``pid``, the worker's.
        fields["process"] = fields.pop("pid")
        try:
            dispatcher.send(EVENT, state="raised" if raised else "cleared", **fields)
        except Exception:
            alert_logger.warning("could not send the alert %s as an event", alert.rule, exc_info=True)

    hub = getattr(worker, "hub", None)
    if hub is not None and threading.current_thread() is not threading.main_thread():
        # The dispatcher's connection belongs to the main loop.
        hub.call_soon(send)
    else:
        send()


class MetricsStep(bootsteps.StartStopStep):
    """Serves statistics to Prometheus, and ``/livez`` and ``/readyz`` to probes, if a port is configured.

    The endpoint starts after the execution pool and lasts until a warm shutdown's last task has ended.
    """

    # Start the thread after the first children are forked. Later children discard its sockets.
    requires = ("celery.worker.components:Timer", "celery.worker.components:Pool")

    def __init__(self, worker: Any, **_: Any) -> None:
        self._endpoint: Any = None
        self._health: Health | None = None
        self._worker: Any = None
        self._uid = f"workerpools-metrics-{id(self)}"

    def start(self, worker: Any) -> None:
        port = read_setting(worker.app.conf, "metrics_port", None)
        if port is None or self._endpoint is not None:
            return
        host = read_setting(worker.app.conf, "metrics_host", METRICS_HOST)
        try:
            # By name: the worker does not depend on the exporters.
            prometheus = import_module("workerpools.prometheus")
            health = Health(worker)
            endpoint = prometheus.serve(
                lambda: {worker.hostname: snapshots(worker.app, worker)},
                host,
                port,
                probes={"/livez": health.live, "/readyz": health.ready},
            )
        except ImportError as error:
            logger.error(
                "workerpools_metrics_port is set, but the metrics endpoint cannot start: %s",
                error,
            )
        except OSError as error:
            logger.error(
                "the metrics endpoint cannot listen on workerpools_metrics_host %s, workerpools_metrics_port %d: %s; "
                "each worker on a machine needs its own port",
                host,
                port,
                error.strerror or error,
            )
        else:
            logger.info("serving metrics at http://%s:%d/metrics", host, endpoint.port)
            self._endpoint, self._worker, self._health = endpoint, worker, health
            signals.worker_shutdown.connect(self._worker_ended, weak=False, dispatch_uid=self._uid)

    def stop(self, worker: Any) -> None:
        """Do nothing: a warm shutdown still runs tasks, which stay visible."""

    def terminate(self, worker: Any) -> None:
        self._close()

    def _worker_ended(self, sender: Any = None, **_: Any) -> None:
        # Ignore the shutdown of another app's worker in this process.
        if sender is self._worker or not hasattr(sender, "app"):
            self._close()

    def _close(self) -> None:
        endpoint, self._endpoint = self._endpoint, None
        self._worker = None
        signals.worker_shutdown.disconnect(dispatch_uid=self._uid)
        if self._health is not None:
            self._health.stop()
        if endpoint is not None:
            endpoint.close()


#: The bootsteps added to each worker.
STEPS = (PoolsStep, AlertsStep, MetricsStep)
