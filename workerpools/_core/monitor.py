"""Evaluates the alerts of one registry, and tells of what was raised and cleared."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from workerpools._core.alarm import State, evaluate
from workerpools._core.alerts import Alert
from workerpools._core.logs import ALERTS, write
from workerpools._core.rules import Thresholds

if TYPE_CHECKING:
    from workerpools._core.registry import Registry

__all__ = ["Monitor", "stopped_among"]

logger = logging.getLogger(ALERTS)


class Monitor:
    """Looks at a registry's statistics, from time to time and in one thread at a time.

    Args:
        registry: Whose.
        thresholds: What is too much; ``leak_after`` is taken from the resources.
    """

    def __init__(self, registry: Registry, thresholds: Thresholds) -> None:
        self._registry = registry
        self._thresholds = thresholds
        self._state = State()

    def look(self, children: Collection[int] | None) -> list[tuple[Alert, bool]]:
        """Evaluate; log what has changed, and call whoever asked for it.

        Args:
            children: The process ids of the worker's living children; None where they are not known.

        Returns:
            Each alert that has changed, and whether it was raised.
        """
        stats = self._registry.collector.snapshot(children)
        leak_after = {each.name: after for each in self._registry.resources if (after := each.leak_after) is not None}
        thresholds = replace(self._thresholds, leak_after=leak_after)
        pids = [process.pid for process in stats.processes if process.index is not None]
        state, raised, cleared = evaluate(self._state, stats, time.monotonic(), thresholds, stopped_among(pids))
        self._state = state
        self._registry.collector.alerts = tuple(state.alerts.values())
        changes = [*((alert, False) for alert in cleared), *((alert, True) for alert in raised)]
        for alert, is_raised in changes:
            log(alert, raised=is_raised)
            self._tell(alert, is_raised)
        return changes

    def _tell(self, alert: Alert, raised: bool) -> None:
        for listener in self._registry.alert_listeners:
            try:
                listener(alert, raised)
            except Exception:
                logger.exception("the alert listener %r failed on %s", listener, alert.rule)


def log(alert: Alert, *, raised: bool) -> None:
    """Write an alert's line."""
    fields: dict[str, object] = {
        "rule": alert.rule,
        **({"resource": alert.resource} if alert.resource else {}),
        **({} if alert.pid is None else {"pid": alert.pid}),
        "value": f"{alert.value:g}",
        "threshold": f"{alert.threshold:g}",
        "lasted": round(max(0.0, time.time() - alert.since), 1),
    }
    level, event = (logging.WARNING, "alert_raised") if raised else (logging.INFO, "alert_cleared")
    write(ALERTS, level, event, fields, alert.message if raised else "")


def stopped_among(pids: Iterable[int]) -> frozenset[int]:
    """Return which of these processes a signal or a debugger has stopped; none where the system does not tell."""
    if sys.platform != "linux":
        return frozenset()
    return frozenset(pid for pid in pids if _state_of(pid) in ("T", "t"))


def _state_of(pid: int) -> str:
    # proc(5), /proc/pid/stat: the state comes after the command's name, which is in parentheses and may hold any text.
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
