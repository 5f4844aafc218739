"""Alerts: hysteresis over the findings of the rules, and the worker's monitor."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from workerpools._run.events import ALERTS, write
from workerpools._stats.rules import RULES, Finding, Key, Seen, Thresholds, examine
from workerpools._stats.snapshot import Alert, WorkerStats

if TYPE_CHECKING:
    from workerpools._celery.pools import WorkerPools as Registry

__all__ = ["Alert", "AlertListener", "Monitor", "Outcome", "State", "evaluate", "stopped_among"]


class AlertListener(Protocol):
    """Anything that can be called with an alert."""

    def __call__(self, alert: Alert, raised: bool, /) -> object:
        """Take note of an alert that was raised or cleared.

        Runs in the worker's main process, where nothing else can go on meanwhile: keep it short, and hand what takes
        time to a task.
        """


#: How often a lasting condition must be seen before it counts.
LOOKS = 3


class Condition(NamedTuple):
    """What is found again and again.

    Attributes:
        finding: The last one that was too much.
        since: When it was found first, on the clock of the evaluation.
        looks: How often it was found.
        active: Whether it is a part of an alert.
        well: Since when all is well; None while it is not.
    """

    finding: Finding
    since: float
    looks: int = 1
    active: bool = False
    well: float | None = None


@dataclass(frozen=True)
class State:
    """What is known from earlier evaluations."""

    seen: Seen = field(default_factory=Seen)
    conditions: Mapping[Key, Condition] = field(default_factory=dict[Key, Condition])
    #: The alerts, by rule and resource: one for all processes, so that a hundred children raise one and not a hundred.
    alerts: Mapping[tuple[str, str], Alert] = field(default_factory=dict[tuple[str, str], Alert])


class Outcome(NamedTuple):
    """What an evaluation comes to."""

    state: State
    raised: tuple[Alert, ...]
    cleared: tuple[Alert, ...]


def evaluate(
    state: State, stats: WorkerStats, now: float, thresholds: Thresholds, stopped: Collection[int] = ()
) -> Outcome:
    """Return what a snapshot changes.

    Args:
        state: What is known.
        stats: The snapshot.
        now: When it was taken, on the clock of :func:`time.monotonic`.
        thresholds: What is too much.
        stopped: The processes that the system says are stopped.
    """
    seen, findings = examine(state.seen, stats, now, thresholds, stopped)
    by_key = {finding.key: finding for finding in findings}
    conditions = dict[Key, Condition]()
    for key in by_key.keys() | state.conditions.keys():
        condition = _step(state.conditions.get(key), by_key.get(key), now, thresholds.clear_after)
        if condition is not None:
            conditions[key] = condition
    alerts = _alerts(conditions, stats.taken - now)
    return Outcome(
        State(seen, conditions, alerts),
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
    # What is gone, a process or a resource, has no trouble any more.
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
