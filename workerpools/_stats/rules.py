"""The rules by which alerts are found: pure functions of snapshots."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from workerpools._run.budget import REPLAY_COST
from workerpools._stats.metrics import FIRST, definition
from workerpools._stats.snapshot import ProcessStats, ResourceStats, WorkerStats

__all__ = [
    "RULES",
    "WINDOWS",
    "Baseline",
    "Creation",
    "Finding",
    "Key",
    "Rule",
    "Spike",
    "Thresholds",
    "examine",
    "judged",
]

#: The windows before the present one that define what is usual.
WINDOWS = 10

#: The most samples kept per window.
SAMPLES = 60


class Creation(NamedTuple):
    """The history of a counter of opened connections.

    Attributes:
        samples: ``(time, count)``, the oldest first; a counter that starts over continues from its last count.
        last: The counter's last value.
        spike: The start of the present spike, and the usual connections per window before it; None without one.
    """

    samples: tuple[tuple[float, float], ...] = ()
    last: float = 0.0
    spike: tuple[float, float] | None = None


class Spike(NamedTuple):
    """The present window, judged.

    Attributes:
        bad: It is a spike.
        good: It is none, by a margin.
        recent: Connections opened within the last window.
        usual: Connections that a window usually opens.
        threshold: More than these are a spike.
    """

    bad: bool
    good: bool
    recent: float
    usual: float
    threshold: float


def judged(
    before: Creation, opened: float, now: float, *, factor: float, floor: float, window: float
) -> tuple[Creation, Spike]:
    """Return the history with one sample more, and the present window judged.

    A starting worker opens its connections, so nothing is a spike within the first two windows. Fewer than ten earlier
    windows define the usual number until there are ten.

    Args:
        before: The history.
        opened: The counter's value.
        now: In seconds, on a monotonic clock.
        factor: A spike exceeds the usual number by more than this factor.
        floor: A spike also exceeds this number.
        window: The length of a window, in seconds.
    """
    samples, spike = _continued(before, opened, now, window), before.spike
    edge = _last_until(samples, now - window)
    if spike is not None and now - spike[0] >= WINDOWS * window:
        # A spike that lasts this long is the usual now; the history before it no longer counts.
        samples, edge, spike = samples[edge:], 0, None
    recent, past = samples[-1][1] - samples[edge][1], samples[edge][0] - samples[0][0]
    judge = past >= window
    usual = (samples[edge][1] - samples[0][1]) * window / past if judge else 0.0
    if spike is not None:
        # While a spike lasts, its own connections do not make it usual.
        usual = spike[1]
    threshold = max(floor, factor * usual)
    bad, good = judge and recent > threshold, not judge or recent <= threshold / 2
    if bad and spike is None:
        spike = now, usual
    elif good:
        spike = None
    return Creation(samples, opened, spike), Spike(bad, good, recent, usual, threshold)


def _continued(before: Creation, opened: float, now: float, window: float) -> tuple[tuple[float, float], ...]:
    samples = before.samples
    if not samples:
        return ((now, opened),)
    # A counter that started over has counted all of its value since.
    more = opened - before.last if opened >= before.last else opened
    new = (now, samples[-1][1] + more)
    # The number of samples per window is bounded, however short the interval.
    if len(samples) > 1 and now - samples[-2][0] < window / SAMPLES:
        samples = samples[:-1]
    # Keep one sample from before the windows: it is where they begin.
    return (*samples[_last_until(samples, now - (WINDOWS + 1) * window) :], new)


def _last_until(samples: tuple[tuple[float, float], ...], when: float) -> int:
    return max(0, bisect_right(samples, when, key=lambda sample: sample[0]) - 1)


@dataclass(frozen=True)
class Thresholds:
    """The limits of the rules; times in seconds.

    Attributes:
        utilisation: The fraction of a process's connections that may be in use for longer than ``sustained``.
        sustained: The time for which more may be in use.
        acquire_wait: The longest wait for a connection; one of :data:`workerpools._stats.metrics.BOUNDS`.
        creation_factor: The multiple of the usual new connections that a window may open.
        creation_floor: The number of new connections that a window may always open.
        window: The length of that window.
        publish_after: The time for which a child may be unseen, stopped, or in the middle of publishing.
        clear_after: The time without trouble after which an alert is cleared.
        leak_after: The longest use of a connection, by resource; unlimited for those without an entry.
    """

    utilisation: float = 0.8
    sustained: float = 60.0
    acquire_wait: float = 5.0
    creation_factor: float = 5.0
    creation_floor: float = 20.0
    window: float = 60.0
    publish_after: float = 30.0
    clear_after: float = 60.0
    leak_after: Mapping[str, float] = field(default_factory=dict[str, float], hash=False)


class Rule(NamedTuple):
    """One rule.

    Attributes:
        name: Its stable name.
        unit: The unit of an alert's value and threshold.
        subject: The subject of its alerts: a ``resource``, or the ``worker``.
        meaning: The condition that raises an alert, in one sentence.
        clears: The condition that starts ``clear_after``.
        settings: Its settings, without the prefix.
        lowest: The lowest value is the worst.
    """

    name: str
    unit: str
    subject: str
    meaning: str
    clears: str
    settings: tuple[str, ...] = ()
    lowest: bool = False


RULES = (
    Rule(
        "utilisation",
        "part",
        "resource",
        "More than this fraction of a process's connections has been in use all the time.",
        "At most nine tenths of the threshold are in use.",
        ("alert_utilisation", "alert_sustained"),
    ),
    Rule(
        "acquire_wait",
        "s",
        "resource",
        "A caller has waited longer than this for a connection, or is waiting that long now.",
        "No caller waits that long.",
        ("alert_acquire_wait",),
    ),
    Rule(
        "creation_spike",
        "connections",
        "resource",
        "More connections were opened within the window than the floor (or 3 for each process, if that is more), and "
        "many times more than in the ten windows before.",
        "At most half of that are opened within a window, or the spike has lasted ten windows and counts as usual.",
        ("alert_creation_factor", "alert_creation_floor", "alert_window"),
    ),
    Rule(
        "budget_empty",
        "tokens",
        "worker",
        "A process cannot pay for another replay: failures are raised or put back on the broker.",
        "The budget can pay for two replays.",
        ("retry_budget",),
        lowest=True,
    ),
    Rule(
        "leak_suspected",
        "connections",
        "resource",
        "Attempts have ended with connections in use, or a connection is in use for longer than leak_after.",
        "No further connection is left in use, and none is held that long.",
        ("leak_after",),
    ),
    Rule(
        "publish_stopped",
        "processes",
        "worker",
        "A living child has no place in the statistics, is stopped by a signal, or has stopped while publishing. An "
        "idle child does not count.",
        "All living children publish and run.",
        ("alert_publish_after",),
    ),
)


class Key(NamedTuple):
    """The subject of a finding; the resource is empty, or the process None, where there is none."""

    rule: str
    resource: str = ""
    pid: int | None = None


class Finding(NamedTuple):
    """A rule's verdict on one snapshot.

    Attributes:
        key: Its subject.
        bad: The threshold is exceeded.
        good: It is kept by a margin. Neither bad nor good leaves an alert as it is.
        value: The measured value, in the rule's unit.
        threshold: The limit.
        hold: The time for which it must be bad before an alert is raised, in seconds.
        message: One sentence, without secrets.
    """

    key: Key
    bad: bool
    good: bool
    value: float
    threshold: float
    hold: float = 0.0
    message: str = ""


class Counted(NamedTuple):
    """The counters of a resource that are compared from one snapshot to the next."""

    long_waits: float = 0.0
    longest: float = 0.0
    leaks: float = 0.0


@dataclass(frozen=True)
class Baseline:
    """The last snapshot's counters, by resource: what the next one is compared with."""

    counted: Mapping[str, Counted] = field(default_factory=dict[str, Counted])
    creation: Mapping[str, Creation] = field(default_factory=dict[str, Creation])
    #: The first snapshot is the baseline; it raises no alerts for what was counted before it.
    first: bool = True


def examine(
    baseline: Baseline, stats: WorkerStats, now: float, thresholds: Thresholds, stopped: Collection[int] = ()
) -> tuple[Baseline, list[Finding]]:
    """Return the next baseline, and the findings of all rules.

    Args:
        baseline: That of the snapshot before.
        stats: The snapshot.
        now: Its time, on the clock of :func:`time.monotonic`.
        thresholds: The limits.
        stopped: Processes stopped by a signal.
    """
    findings = [
        *_utilisation(stats, thresholds),
        *_budget_empty(stats),
        *_publish_stopped(stats, thresholds, stopped),
    ]
    counted, creation = dict[str, Counted](), dict[str, Creation]()
    held = _held(stats)
    for total in stats.totals():
        name = total.name
        waits = total.histogram("acquire_wait")
        is_now = Counted(waits.above(thresholds.acquire_wait), waits.max, total.value("leaks"))
        before = baseline.counted.get(name, is_now if baseline.first else Counted())
        counted[name] = is_now
        longest_wait, longest_use = held.get(name, (0.0, 0.0))
        findings.append(_acquire_wait(name, before, is_now, longest_wait, thresholds))
        findings.append(_leak_suspected(name, before, is_now, longest_use, thresholds))
        creation[name], spike = judged(
            baseline.creation.get(name, Creation()),
            total.value("opened"),
            now,
            factor=thresholds.creation_factor,
            floor=max(thresholds.creation_floor, 3 * len(stats.processes)),
            window=thresholds.window,
        )
        findings.append(
            Finding(
                Key("creation_spike", name),
                spike.bad,
                spike.good,
                spike.recent,
                spike.threshold,
                message=f"connections of {name!r} opened within {thresholds.window:g} s: {spike.recent:.0f}; "
                f"usually {spike.usual:.1f}",
            )
        )
    return Baseline(counted, creation, first=False), findings


def _each(stats: WorkerStats) -> Iterator[tuple[ProcessStats, ResourceStats]]:
    for process in stats.processes:
        for resource in process.resources:
            yield process, resource


def _held(stats: WorkerStats) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for _, each in _each(stats):
        wait, use = found.get(each.name, (0.0, 0.0))
        found[each.name] = (max(wait, each.row[_LONGEST_WAIT]), max(use, each.row[_LONGEST_USE]))
    return found


_LONGEST_WAIT, _LONGEST_USE = FIRST[definition("longest_wait").name], FIRST[definition("longest_use").name]


def _utilisation(stats: WorkerStats, thresholds: Thresholds) -> Iterator[Finding]:
    for process, each in _each(stats):
        if not each.limit:
            continue
        # With HTTP/2 more requests than connections are in use; no more connections are than are open.
        in_use = min(each.in_use, each.open) if each.open else each.in_use
        value = in_use / each.limit
        yield Finding(
            Key("utilisation", each.name, process.pid),
            value > thresholds.utilisation,
            value <= 0.9 * thresholds.utilisation,
            value,
            thresholds.utilisation,
            thresholds.sustained,
            f"{in_use} of {each.limit} connections of {each.name!r} in use in process {process.pid}",
        )


def _acquire_wait(name: str, before: Counted, now: Counted, pending: float, thresholds: Thresholds) -> Finding:
    bound = thresholds.acquire_wait
    # A counter that started over has counted all of its value since.
    more = now.long_waits - before.long_waits if now.long_waits >= before.long_waits else now.long_waits
    if more:
        # The longest wait ever is exact if it is one of the new ones; otherwise only the bound is known.
        value = now.longest if now.longest > before.longest else max(pending, bound)
        message = f"callers that have waited longer than {bound:g} s for a connection of {name!r}: {more:.0f}"
    else:
        value, message = pending, f"a caller is waiting for a connection of {name!r} for {pending:.1f} s"
    bad = bool(more) or pending > bound
    return Finding(Key("acquire_wait", name), bad, not bad, value, bound, message=message)


def _leak_suspected(name: str, before: Counted, now: Counted, use: float, thresholds: Thresholds) -> Finding:
    more = now.leaks - before.leaks if now.leaks >= before.leaks else now.leaks
    after = thresholds.leak_after.get(name)
    held = after is not None and use > after
    message = (
        f"connections of {name!r} still in use at the end of their attempt: {more:.0f}"
        if more
        else f"a connection of {name!r} is in use for {use:.1f} s"
    )
    bad = bool(more) or held
    return Finding(Key("leak_suspected", name), bad, not bad, more or float(held), 0.0, message=message)


def _budget_empty(stats: WorkerStats) -> Iterator[Finding]:
    for process in stats.processes:
        # A budget smaller than one replay never allowed any.
        if process.capacity >= REPLAY_COST:
            yield Finding(
                Key("budget_empty", "", process.pid),
                process.tokens < REPLAY_COST,
                process.tokens >= min(2 * REPLAY_COST, process.capacity),
                process.tokens,
                REPLAY_COST,
                message=f"{process.tokens} of {process.capacity} tokens left for replays in process {process.pid}",
            )


def _publish_stopped(stats: WorkerStats, thresholds: Thresholds, stopped: Collection[int]) -> Iterator[Finding]:
    hold = thresholds.publish_after
    for process in stats.processes:
        halted = process.pid in stopped
        bad = halted or process.interrupted
        why = "is stopped by a signal" if halted else "has stopped in the middle of publishing"
        yield Finding(
            Key("publish_stopped", "", process.pid), bad, not bad, float(bad), 0.0, hold, f"process {process.pid} {why}"
        )
    unseen = stats.unseen
    yield Finding(
        Key("publish_stopped"),
        unseen > 0,
        unseen == 0,
        unseen,
        0.0,
        hold,
        f"living children that publish nothing: {unseen}",
    )
