"""Whether a worker is alive and ready, for the probes of Kubernetes and Compose.

Looks at this process alone: a probe costs neither a message to the broker nor a process of its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from celery import signals
from celery.worker import state

from workerpools._celery import apps
from workerpools._celery.lifecycle import execution_pool
from workerpools._celery.sharing import children

__all__ = ["BEAT", "STALLED_AFTER", "Check", "Facts", "Health", "live", "ready"]

#: The time between two turns of the main loop that are noted, in seconds.
BEAT = 1.0

#: How long the main loop may not turn, in seconds. Forking children and resolving names take some.
STALLED_AFTER = 30.0


class Check(NamedTuple):
    """One check.

    Attributes:
        name: What was checked.
        passed: Whether it passed.
        told: The reason, or what was found.
    """

    name: str
    passed: bool
    told: str


@dataclass(frozen=True)
class Facts:
    """What is known of a worker.

    Attributes:
        stalled: How long the main loop has not turned, in seconds; None if it need not turn now, or is not observed.
        why_not: Why ``stalled`` is None.
        connected: Whether the worker is connected to the broker.
        stopping: Whether it is shutting down.
        children: How many children live, and how many should; None without children.
        unpublished: What the alerts say of children that publish nothing.
    """

    stalled: float | None = 0.0
    why_not: str = ""
    connected: bool = True
    stopping: bool = False
    children: tuple[int, int] | None = None
    unpublished: tuple[str, ...] = ()


def live(facts: Facts) -> list[Check]:
    """Return the checks of ``/livez``: one that fails is mended by a restart of the worker.

    Without a broker a worker is alive: it reconnects by itself, and a restart would end its tasks.
    """
    stalled = facts.stalled
    checks = [
        Check("main loop", True, facts.why_not)
        if stalled is None
        else Check("main loop", stalled <= STALLED_AFTER, f"turned {stalled:.1f} s ago")
    ]
    if facts.children is not None:
        alive, wanted = facts.children
        checks.append(Check("children", alive > 0 or facts.stopping or not wanted, f"{alive} of {wanted} alive"))
    return checks


def ready(facts: Facts) -> list[Check]:
    """Return the checks of ``/readyz``: whether the worker takes tasks and runs them as it should."""
    loop = live(facts)[0]
    checks = [
        loop,
        Check("broker", facts.connected, "connected" if facts.connected else "not connected; reconnecting"),
        Check("shutdown", not facts.stopping, "in progress; no new tasks" if facts.stopping else "none"),
    ]
    if facts.children is not None:
        alive, wanted = facts.children
        checks.append(Check("children", alive >= wanted, f"{alive} of {wanted} alive"))
        told = "; ".join(facts.unpublished)
        checks.append(Check("publishing", not told, told or "every child publishes its statistics"))
    return checks


class Health:
    """Observes a worker from a bootstep of it.

    Args:
        worker: The worker.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._beaten = time.monotonic()
        # Of the broker connection at the last probe: when it was first seen. Connecting takes the main loop's time.
        self._seen: tuple[Any, float] = (None, self._beaten)
        self._timer = worker.timer.call_repeatedly(BEAT, self._beat)
        self._solo = execution_pool(worker).kind == "solo"
        if self._solo:
            # Its tasks occupy the main loop, which turns again from here.
            signals.task_postrun.connect(self._beat)

    def stop(self) -> None:
        """Note no more turns of the main loop."""
        self._timer.cancel()
        signals.task_postrun.disconnect(self._beat)

    def live(self) -> list[Check]:
        """Return the checks of ``/livez``."""
        return live(self._facts())

    def ready(self) -> list[Check]:
        """Return the checks of ``/readyz``."""
        return ready(self._facts())

    def _beat(self, **_: Any) -> None:
        self._beaten = time.monotonic()

    def _facts(self) -> Facts:
        worker, now = self._worker, time.monotonic()
        connection = getattr(getattr(worker, "consumer", None), "connection", None)
        if connection is not self._seen[0]:
            self._seen = (connection, now)
        stopping = state.should_stop is not None or state.should_terminate is not None
        why_not = self._why_not(connection, stopping)
        living = children(worker) if execution_pool(worker).kind == "prefork" else None
        return Facts(
            stalled=None if why_not else max(0.0, now - max(self._beaten, self._seen[1])),
            why_not=why_not,
            connected=_connected(connection),
            stopping=stopping,
            children=None if living is None else (len(living), int(getattr(worker.pool, "num_processes", 0))),
            unpublished=tuple(
                alert.message
                for pools in apps.all_of(worker.app)
                for alert in pools.collector.alerts
                if alert.rule == "publish_stopped"
            ),
        )

    def _why_not(self, connection: Any, stopping: bool) -> str:
        """Return why the main loop need not turn now; empty if it must."""
        if stopping:
            return "ends with the shutdown"
        if connection is None:
            return "waits for the broker"
        if self._solo and state.active_requests:
            return "runs a task"
        kind = execution_pool(self._worker).kind
        if not getattr(self._worker, "use_eventloop", False) and kind not in ("gevent", "eventlet"):
            return "is not observed with this broker"
        return ""


def _connected(connection: Any) -> bool:
    try:
        return connection is not None and bool(connection.connected)
    except Exception:  # it was closed meanwhile
        return False
