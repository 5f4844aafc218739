"""Alerts: hysteresis over the findings of the rules, and the worker's monitor."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from workerpools._run.events import ALERTS, write
from workerpools._stats.collector import Collector
from workerpools._stats.rules import RULES, Baseline, Finding, Key, Thresholds, examine
from workerpools._stats.snapshot import Alert, WorkerStats

__all__ = ["Alert", "AlertListener", "Monitor", "Outcome", "State", "evaluate", "stopped_among"]


class AlertListener(Protocol):
    """A callable that accepts an alert."""

    def __call__(self, alert: Alert, raised: bool, /) -> object:
        """Handle an alert that was raised or cleared.

        Runs in the worker's main loop and blocks it: keep it short, and send a task for slow work.

        Args:
            alert: The alert.
            raised: True if it was raised, False if it was cleared.

        Raises:
            Exception: Logged; the other listeners are still called.
        """


#: The evaluations in which a lasting condition must be found before it counts.
LOOKS = 3


class Condition(NamedTuple):
    """A finding that was bad, from its first evaluation until it is cleared.

    Attributes:
        finding: The last bad one.
        since: The time of the first bad one, on the clock of the evaluations.
        looks: The number of bad ones.
        active: It is part of an alert.
        well: The time since which it has been good; None while it is not.
    """

    finding: Finding
    since: float
    looks: int = 1
    active: bool = False
    well: float | None = None


@dataclass(frozen=True)
class State:
    """The result of the evaluations so far."""

    baseline: Baseline = field(default_factory=Baseline)
    conditions: Mapping[Key, Condition] = field(default_factory=dict[Key, Condition])
    #: By rule and resource, over all processes: a hundred children raise one alert, not a hundred.
    alerts: Mapping[tuple[str, str], Alert] = field(default_factory=dict[tuple[str, str], Alert])


class Outcome(NamedTuple):
    """The result of an evaluation, and the alerts that it changed."""

    state: State
    raised: tuple[Alert, ...]
    cleared: tuple[Alert, ...]


def evaluate(
    state: State, stats: WorkerStats, now: float, thresholds: Thresholds, stopped: Collection[int] = ()
) -> Outcome:
    """Return the state after a snapshot, and the alerts that it raises and clears.

    Args:
        state: The state before.
        stats: The snapshot.
        now: Its time, on the clock of :func:`time.monotonic`.
        thresholds: The limits.
        stopped: Processes stopped by a signal.
    """
    baseline, findings = examine(state.baseline, stats, now, thresholds, stopped)
    by_key = {finding.key: finding for finding in findings}
    conditions = dict[Key, Condition]()
    for key in by_key.keys() | state.conditions.keys():
        condition = _step(state.conditions.get(key), by_key.get(key), now, thresholds.clear_after)
        if condition is not None:
            conditions[key] = condition
    alerts = _alerts(conditions, stats.taken - now)
    return Outcome(
        State(baseline, conditions, alerts),
        tuple(alert for key, alert in alerts.items() if key not in state.alerts),
        tuple(alert for key, alert in state.alerts.items() if key not in alerts),
    )


def _step(condition: Condition | None, finding: Finding | None, now: float, clear_after: float) -> Condition | None:
    if finding is not None and finding.bad:
        since, looks = (now, 1) if condition is None else (condition.since, condition.looks + 1)
        lasted = now - since >= finding.hold and (finding.hold <= 0 or looks >= LOOKS)
        return Condition(finding, since, looks, lasted or (condition is not None and condition.active))
    if condition is None or not condition.active:
        return None
    # A process or resource that is gone counts as well.
    if finding is not None and not finding.good:
        return condition._replace(well=None)
    well = now if condition.well is None else condition.well
    return None if now - well >= clear_after else condition._replace(well=well)


_LOWEST = frozenset(rule.name for rule in RULES if rule.lowest)


def _alerts(conditions: Mapping[Key, Condition], offset: float) -> dict[tuple[str, str], Alert]:
    groups: dict[tuple[str, str], list[Condition]] = {}
    for key, condition in sorted(conditions.items(), key=lambda item: (item[0].rule, item[0].resource)):
        if condition.active:
            groups.setdefault((key.rule, key.resource), []).append(condition)
    return {group: _alert(group, members, offset) for group, members in groups.items()}


def _alert(group: tuple[str, str], members: list[Condition], offset: float) -> Alert:
    rule, resource = group
    worst = max(
        (member.finding for member in members),
        key=lambda finding: -finding.value if rule in _LOWEST else finding.value,
    )
    others = len(members) - 1
    more = f", and {others} more like that" if others else ""
    return Alert(
        rule=rule,
        resource=resource,
        pid=None if others else worst.key.pid,
        since=offset + min(member.since for member in members),
        value=worst.value,
        threshold=worst.threshold,
        message=f"{worst.message}{more}",
    )


logger = logging.getLogger(ALERTS)


class Monitor:
    """Evaluates the statistics of one WorkerPools whenever :meth:`look` is called, by one thread at a time.

    Args:
        collector: Takes the snapshots, and is given the present alerts.
        thresholds: The limits.
        leak_after: Returns the resources' own limits for ``thresholds.leak_after``.
        listeners: Returns the listeners to call.
    """

    def __init__(
        self,
        collector: Collector,
        thresholds: Thresholds,
        leak_after: Callable[[], Mapping[str, float]] = dict,
        listeners: Callable[[], Iterable[AlertListener]] = tuple,
    ) -> None:
        self._collector = collector
        self._thresholds = thresholds
        self._leak_after = leak_after
        self._listeners = listeners
        self._state = State()

    def look(self, children: Collection[int] | None) -> list[tuple[Alert, bool]]:
        """Evaluate a snapshot; log the changes, and call the listeners.

        Args:
            children: The process ids of the worker's living children; None if unknown.

        Returns:
            Each alert that has changed, with True if it was raised, False if it was cleared.
        """
        stats = self._collector.snapshot(children)
        thresholds = replace(self._thresholds, leak_after=self._leak_after())
        pids = [process.pid for process in stats.processes if process.index is not None]
        state, raised, cleared = evaluate(self._state, stats, time.monotonic(), thresholds, stopped_among(pids))
        self._state = state
        self._collector.alerts = tuple(state.alerts.values())
        changes = [*((alert, False) for alert in cleared), *((alert, True) for alert in raised)]
        for alert, is_raised in changes:
            log(alert, raised=is_raised)
            self._tell(alert, is_raised)
        return changes

    def _tell(self, alert: Alert, raised: bool) -> None:
        for listener in self._listeners():
            try:
                listener(alert, raised)
            except Exception:
                logger.exception("the alert listener %r failed on %s", listener, alert.rule)


def log(alert: Alert, *, raised: bool) -> None:
    """Log an alert."""
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
    """Return the processes stopped by a signal or a debugger; none where the system is not Linux."""
    if sys.platform != "linux":
        return frozenset()
    return frozenset(pid for pid in pids if _state_of(pid) in ("T", "t"))


def _state_of(pid: int) -> str:
    # proc(5), /proc/pid/stat: the state comes after the command's name, which is in parentheses and may hold any text.
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
