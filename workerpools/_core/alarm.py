"""When findings become alerts, and when alerts end. Pure: a state and a snapshot give the next state.

What is found must last for as long as its rule holds it back, and be seen three times where that is a while at all:
a gap between two looks proves nothing. An alert ends when all has been well for a while. Between the two lies what is
neither: it begins nothing and ends nothing, so that a value about its threshold does not flap.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from workerpools._core.alerts import Alert
from workerpools._core.rules import RULES, Finding, Key, Seen, Thresholds, examine
from workerpools._core.stats import WorkerStats

__all__ = ["Outcome", "State", "evaluate"]

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
