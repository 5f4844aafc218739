"""What is counted: one table of definitions, from which snapshots, exporters, pages and the documentation are made.

A resource's numbers lie one after the other in a row of :data:`WIDTH` floats; :data:`FIRST` tells where each begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from itertools import accumulate
from typing import NamedTuple

from workerpools._run.failure import FailureKind

__all__ = [
    "AGES",
    "BOUNDS",
    "CLOSE_REASONS",
    "DEFINITIONS",
    "FIRST",
    "WIDTH",
    "Definition",
    "MetricType",
    "definition",
    "fold",
    "lasting",
    "merge",
]


class MetricType(str, Enum):
    """How numbers of one name behave, and so how those of several processes are put together."""

    #: Never falls while the worker lives; added up.
    COUNTER = "counter"
    #: What is so at this moment; added up over living processes.
    GAUGE = "gauge"
    #: What is so at this moment; the highest of the living processes.
    MAX = "max"
    #: Counts by upper bound, the last one without a bound; then the sum, and the highest value ever.
    HISTOGRAM = "histogram"


#: The upper bounds of histograms, in seconds; a last bucket has none. With 5 s, above which a wait is an alert.
BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0)

#: Those of what takes longer; as many, so that all histograms are laid out alike.
AGES = (1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)

#: Why a connection was closed.
CLOSE_REASONS = ("idle", "lifetime", "stale", "recycled", "shutdown", "discarded", "other")


class Definition(NamedTuple):
    """One number, or one for each value of a label, or one histogram.

    Attributes:
        name: The stable name, in snapshots and in their JSON form.
        unit: ``s`` for seconds, else what is counted.
        type: How it behaves.
        meaning: One sentence for people.
        label: What tells its numbers apart; empty where there is one alone.
        values: The label's values.
        bounds: The upper bounds of a histogram's buckets, in seconds.
    """

    name: str
    unit: str
    type: MetricType
    meaning: str
    label: str = ""
    values: tuple[str, ...] = ()
    bounds: tuple[float, ...] = BOUNDS

    @property
    def width(self) -> int:
        """How many floats it takes in a row."""
        if self.type is MetricType.HISTOGRAM:
            return len(self.bounds) + 3
        return len(self.values) or 1

    @property
    def prometheus(self) -> str:
        """Its series in Prometheus: base units in the plural, counters with ``total``; without a histogram's suffixes.

        See https://prometheus.io/docs/practices/naming/.
        """
        parts = ["workerpools", *self._words]
        if self.unit == "s":
            parts.append("seconds")
        if self.type is MetricType.COUNTER:
            parts.append("total")
        return "_".join(parts)

    @property
    def opentelemetry(self) -> str:
        """Its metric in OpenTelemetry, where no semantic convention names it."""
        return ".".join(["workerpools", *self._words])

    @property
    def _words(self) -> list[str]:
        # ``open`` and ``opened`` name a state and an event; the unit says of what.
        return [self.name] if self.unit == "s" or self.name.endswith("s") else [self.unit, self.name]


DEFINITIONS = (
    Definition("open", "connections", MetricType.GAUGE, "Connections that are open."),
    Definition(
        "in_use",
        "connections",
        MetricType.GAUGE,
        "Connections in use; requests, where a client sends several over one connection.",
    ),
    Definition("idle", "connections", MetricType.GAUGE, "Connections that are open and not in use."),
    Definition("limit", "connections", MetricType.GAUGE, "Connections that may be open; 0 where there is no limit."),
    Definition("pending", "acquisitions", MetricType.GAUGE, "Callers that wait for a connection."),
    Definition("longest_wait", "s", MetricType.MAX, "For how long the caller that waits longest has been waiting."),
    Definition("longest_use", "s", MetricType.MAX, "For how long the connection that is out longest has been in use."),
    Definition("opened", "connections", MetricType.COUNTER, "Connections that were opened."),
    Definition(
        "closed",
        "connections",
        MetricType.COUNTER,
        "Connections that were closed: not used for max_idle, older than max_lifetime, found or suspected to be dead, "
        "recycled on demand, closed with the resource, inherited by a fork and dropped (not counted as opened there), "
        "or otherwise: in use when it failed, or not to be kept.",
        "reason",
        CLOSE_REASONS,
    ),
    Definition(
        "reused", "acquisitions", MetricType.COUNTER, "Acquisitions that got a connection which was open already."
    ),
    Definition("acquire_wait", "s", MetricType.HISTOGRAM, "Waits for a connection, without the time to open one."),
    Definition(
        "acquire_timeouts", "acquisitions", MetricType.COUNTER, "Waits for a connection that ended without one."
    ),
    Definition("create_time", "s", MetricType.HISTOGRAM, "How long opening a connection took, with TLS and log-in."),
    Definition("use_time", "s", MetricType.HISTOGRAM, "For how long a connection was in use at a time."),
    Definition(
        "open_time",
        "s",
        MetricType.HISTOGRAM,
        "For how long a connection was open, told when it is closed; unknown where it was detached from its pool.",
        bounds=AGES,
    ),
    Definition("checks", "checks", MetricType.COUNTER, "Idle connections that were checked before they were used."),
    Definition("failed_checks", "checks", MetricType.COUNTER, "Checks that found a dead connection."),
    Definition(
        "failures",
        "failures",
        MetricType.COUNTER,
        "Failures of connections, caught by the task or not, by what they prove.",
        "kind",
        tuple(kind.value for kind in FailureKind),
    ),
    Definition(
        "replays", "replays", MetricType.COUNTER, "Bodies and requests that were run again at once in the process."
    ),
    Definition("retries", "retries", MetricType.COUNTER, "Tasks that were put back on the broker."),
    Definition("refused_replays", "failures", MetricType.COUNTER, "Failures after which nothing was run again."),
    Definition("resolved_commits", "commits", MetricType.COUNTER, "Lost COMMITs whose outcome was found out."),
    Definition("attempts", "attempts", MetricType.COUNTER, "Runs of a task body that used the resource."),
    Definition(
        "leaks", "connections", MetricType.COUNTER, "Connections that were still in use when their attempt had ended."
    ),
)

#: The numbers of a row.
WIDTH = sum(each.width for each in DEFINITIONS)

#: Where each definition's numbers begin in a row.
FIRST: dict[str, int] = dict(
    zip(
        (each.name for each in DEFINITIONS),
        accumulate((each.width for each in DEFINITIONS), initial=0),
        strict=False,  # the last sum is the width
    )
)

_BY_NAME = {definition.name: definition for definition in DEFINITIONS}


def definition(name: str) -> Definition:
    """Return the definition of that name.

    Raises:
        KeyError: There is none.
    """
    return _BY_NAME[name]


def _cells(types: tuple[MetricType, ...]) -> list[int]:
    return [FIRST[each.name] + n for each in DEFINITIONS if each.type in types for n in range(each.width)]


#: The numbers of which the highest counts: the last one of each histogram is its highest value.
_HIGHEST = _cells((MetricType.MAX,)) + [
    FIRST[each.name] + each.width - 1 for each in DEFINITIONS if each.type is MetricType.HISTOGRAM
]
#: The numbers that end with their process.
_MOMENTARY = _cells((MetricType.GAUGE, MetricType.MAX))


def merge(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return one row for the rows of several processes: added up, or the highest where that is what counts."""
    if not rows:
        return [0.0] * WIDTH
    if len(rows) == 1:
        return list(rows[0])
    merged = [float(sum(column)) for column in zip(*rows, strict=True)]
    for cell in _HIGHEST:
        merged[cell] = max(row[cell] for row in rows)
    return merged


def fold(past: Sequence[float], last: Sequence[float]) -> list[float]:
    """Return what stays of a process that has ended: its counters join those of its predecessors.

    Args:
        past: The row of its predecessors.
        last: Its own last row.
    """
    return lasting(merge([past, last]))


def lasting(row: Sequence[float]) -> list[float]:
    """Return a row without what was so at its moment alone."""
    counters = list(row)
    for cell in _MOMENTARY:
        counters[cell] = 0.0
    return counters
