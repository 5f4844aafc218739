"""The statistics: one table of definitions for snapshots, exporters, pages and documentation.

A resource's numbers form a row of :data:`WIDTH` floats; :data:`FIRST` gives the position of each definition.
"""

from __future__ import annotations

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
]


class MetricType(str, Enum):
    """The type of a number, which determines how those of several processes are merged."""

    #: Never decreases during the worker's life; added up.
    COUNTER = "counter"
    #: A current state; added up over living processes.
    GAUGE = "gauge"
    #: A current state; the maximum over living processes.
    MAX = "max"
    #: Counts by upper bound, the last one unbounded; then the sum, and the highest value ever.
    HISTOGRAM = "histogram"


#: The upper bounds of histogram buckets, in seconds; the last bucket has none. Includes 5 s, the alert limit of waits.
BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0)

#: The same for longer durations; as many, so that all histograms have the same layout.
AGES = (1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)

#: The reasons for closing a connection.
CLOSE_REASONS = ("idle", "lifetime", "stale", "recycled", "shutdown", "discarded", "other")


class Definition(NamedTuple):
    """A number, a set of numbers by label, or a histogram.

    Attributes:
        name: The stable name, in snapshots and in their JSON form.
        unit: ``s`` for seconds; otherwise the things counted.
        type: The type of the number.
        meaning: One sentence for people.
        label: The label that distinguishes its numbers; empty for a single number.
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
        """Its number of floats in a row."""
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
        """Its metric in OpenTelemetry, unless a semantic convention defines the name."""
        return ".".join(["workerpools", *self._words])

    @property
    def _words(self) -> list[str]:
        # ``open`` and ``opened`` need the unit as their subject.
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
    Definition("limit", "connections", MetricType.GAUGE, "The most connections that may be open; 0 without a limit."),
    Definition("pending", "acquisitions", MetricType.GAUGE, "Callers waiting for a connection."),
    Definition("longest_wait", "s", MetricType.MAX, "How long the longest-waiting caller has been waiting."),
    Definition("longest_use", "s", MetricType.MAX, "How long the longest-held connection has been in use."),
    Definition("opened", "connections", MetricType.COUNTER, "Connections opened."),
    Definition(
        "closed",
        "connections",
        MetricType.COUNTER,
        "Connections closed: idle for max_idle, older than max_lifetime, found or suspected to be dead, recycled on "
        "demand, closed with the resource, inherited by a fork and discarded (not counted as opened there), or for "
        "another reason, such as a failure while in use.",
        "reason",
        CLOSE_REASONS,
    ),
    Definition("reused", "acquisitions", MetricType.COUNTER, "Acquisitions of a connection that was already open."),
    Definition(
        "acquire_wait", "s", MetricType.HISTOGRAM, "Time spent waiting for a connection, without the time to open one."
    ),
    Definition("acquire_timeouts", "acquisitions", MetricType.COUNTER, "Waits for a connection that timed out."),
    Definition("create_time", "s", MetricType.HISTOGRAM, "Time taken to open a connection, with TLS and log-in."),
    Definition("use_time", "s", MetricType.HISTOGRAM, "Time a connection was in use, per checkout."),
    Definition(
        "open_time",
        "s",
        MetricType.HISTOGRAM,
        "Time a connection was open, recorded when it is closed; unknown if it was detached from its pool.",
        bounds=AGES,
    ),
    Definition("checks", "checks", MetricType.COUNTER, "Checks of idle connections before use."),
    Definition("failed_checks", "checks", MetricType.COUNTER, "Checks that found a dead connection."),
    Definition(
        "failures",
        "failures",
        MetricType.COUNTER,
        "Connection failures, caught by the task or not, by kind.",
        "kind",
        tuple(kind.value for kind in FailureKind),
    ),
    Definition("replays", "replays", MetricType.COUNTER, "Bodies and requests run again at once in the same process."),
    Definition("retries", "retries", MetricType.COUNTER, "Tasks put back on the broker."),
    Definition("refused_replays", "failures", MetricType.COUNTER, "Failures after which nothing ran again."),
    Definition(
        "resolved_commits",
        "commits",
        MetricType.COUNTER,
        "COMMITs with a lost acknowledgement whose outcome was resolved.",
    ),
    Definition(
        "unbatched",
        "transactions",
        MetricType.COUNTER,
        "Transactions whose first statement could not share its round trip with BEGIN.",
    ),
    Definition("attempts", "attempts", MetricType.COUNTER, "Runs of a task body that used the resource."),
    Definition("leaks", "connections", MetricType.COUNTER, "Connections still in use after the end of their attempt."),
)

#: The length of a row.
WIDTH = sum(each.width for each in DEFINITIONS)

#: The position of each definition's first number in a row.
FIRST: dict[str, int] = dict(
    zip(
        (each.name for each in DEFINITIONS),
        accumulate((each.width for each in DEFINITIONS), initial=0),
        strict=False,  # the last sum is the width
    )
)

_BY_NAME = {definition.name: definition for definition in DEFINITIONS}


def definition(name: str) -> Definition:
    """Return the definition called ``name``.

    Raises:
        KeyError: There is no such definition.
    """
    return _BY_NAME[name]
