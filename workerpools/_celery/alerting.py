"""Has a worker look for alerts from time to time, and send them as Celery events.

Where the timer of the worker runs depends on its execution pool and broker: in the main loop (prefork and threads with
a broker that has an event loop, as Redis and RabbitMQ), in a greenlet, or in Celery's own timer thread. That is the
right place in all of them but solo: there a task occupies the main loop, so that a thread of its own looks. Nowhere
else is one started: a prefork parent forks, and what another thread holds at that moment stays held in the child.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from celery import bootsteps

from workerpools._celery.lifecycle import execution_pool
from workerpools._celery.pools import WorkerPools
from workerpools._celery.settings import read_settings
from workerpools._celery.sharing import children
from workerpools._run.events import ALERTS
from workerpools._stats.alerts import Monitor
from workerpools._stats.rules import Thresholds
from workerpools._stats.snapshot import Alert

__all__ = ["EVENT", "INTERVAL", "AlertsStep"]

#: The event's type. Its prefix is ours alone: Flower and Celery take ``worker-`` and ``task-`` for states of theirs.
EVENT = "pools-alert"

#: How often alerts are looked for, in seconds, unless the settings say otherwise.
INTERVAL = 5.0

logger = logging.getLogger(ALERTS)


class AlertsStep(bootsteps.StartStopStep):
    """Looks for the alerts of the app's connection pools as long as its worker runs."""

    requires = ("celery.worker.components:Timer", "celery.worker.components:Pool")

    def __init__(self, worker: Any, **options: Any) -> None:
        self._cancel: Callable[[], object] = _nothing
        self._monitors: dict[int, tuple[WorkerPools, Monitor]] = {}
        self._thresholds = Thresholds()
        self._failure = ""
        super().__init__(worker, **options)

    def start(self, worker: Any) -> None:
        settings = read_settings(worker.app.conf)
        interval = settings.get("alert_interval", INTERVAL)
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
            for pools in WorkerPools.all_of(worker.app):
                _, monitor = self._monitors.setdefault(id(pools), (pools, Monitor(pools, self._thresholds)))
                for alert, raised in monitor.look(living):
                    _send(worker, alert, raised)
            self._failure = ""
        except Exception as error:
            if (failure := repr(error)) != self._failure:
                self._failure = failure
                logger.exception("alerts could not be looked for; it is tried again")


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
            logger.warning("the alert %s was not sent as an event", alert.rule, exc_info=True)

    hub = getattr(worker, "hub", None)
    if hub is not None and threading.current_thread() is not threading.main_thread():
        # Its connection is the main loop's.
        hub.call_soon(send)
    else:
        send()
