"""The instruments, named by the semantic conventions where there is one for the kind of client, else ``workerpools.…``.

Conventions: https://opentelemetry.io/docs/specs/semconv/db/database-metrics/#connection-pools and
https://opentelemetry.io/docs/specs/semconv/http/http-metrics/#http-client, in the release of :data:`SCHEMA_URL`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from workerpools._stats.metrics import DEFINITIONS, Definition, MetricType
from workerpools._stats.snapshot import OF_WORKERS, Histogram, ResourceStats

__all__ = [
    "ALERT",
    "INSTRUMENTS",
    "SCHEMA_URL",
    "Form",
    "Instrument",
    "Recording",
    "added",
    "applies",
    "attributes",
    "measured",
    "parts_of",
    "recordings",
]

SCHEMA_URL = "https://opentelemetry.io/schemas/1.45.0"

Server = tuple[str, int]


class Form(str, Enum):
    """The kind of an instrument."""

    COUNTER = "counter"
    UP_DOWN_COUNTER = "up-down counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


_FORMS = {
    MetricType.COUNTER: Form.COUNTER,
    MetricType.GAUGE: Form.UP_DOWN_COUNTER,
    MetricType.MAX: Form.GAUGE,
    MetricType.HISTOGRAM: Form.HISTOGRAM,
}


class Part(NamedTuple):
    """A statistic reported by an instrument.

    Attributes:
        definition: The statistic.
        kind: The kind of resource it applies to; None for every kind without a convention for this statistic.
        state: The attribute and value that distinguish it from the instrument's other parts.
    """

    definition: Definition
    kind: str | None = None
    state: tuple[str, str] | None = None


class Instrument(NamedTuple):
    """An instrument.

    Attributes:
        name: The name.
        unit: The unit, in UCUM notation.
        form: Counter, gauge, ….
        meaning: The description, one sentence.
        parts: Its statistics; empty for a statistic of the worker itself.
        bounds: The upper bounds of a histogram's buckets, in seconds.
    """

    name: str
    unit: str
    form: Form
    meaning: str
    parts: tuple[Part, ...] = ()
    bounds: tuple[float, ...] = ()


class _Convention(NamedTuple):
    kind: str
    definition: str
    name: str
    unit: str
    meaning: str
    state: tuple[str, str] | None = None


POOL_NAME = "db.client.connection.pool.name"
_DB_STATE = "db.client.connection.state"
_HTTP_STATE = "http.connection.state"
_COUNT = "The number of connections that are currently in the state that the attribute describes."
_OPEN = "Number of outbound HTTP connections that are currently active or idle on the client."

_CONVENTIONS = (
    _Convention("database", "in_use", "db.client.connection.count", "{connection}", _COUNT, (_DB_STATE, "used")),
    _Convention("database", "idle", "db.client.connection.count", "{connection}", _COUNT, (_DB_STATE, "idle")),
    _Convention(
        "database",
        "limit",
        "db.client.connection.limit",
        "{connection}",
        "The maximum number of open connections allowed.",
    ),
    _Convention(
        "database",
        "pending",
        "db.client.connection.pending_requests",
        "{request}",
        "The number of current pending requests for an open connection.",
    ),
    _Convention(
        "database",
        "acquire_timeouts",
        "db.client.connection.timeouts",
        "{timeout}",
        "The number of connection timeouts that have occurred trying to obtain a connection from the pool.",
    ),
    _Convention(
        "database",
        "create_time",
        "db.client.connection.create_time",
        "s",
        "The time it took to create a new connection.",
    ),
    _Convention(
        "database",
        "acquire_wait",
        "db.client.connection.wait_time",
        "s",
        "The time it took to obtain an open connection from the pool; without the time to create one.",
    ),
    _Convention(
        "database",
        "use_time",
        "db.client.connection.use_time",
        "s",
        "The time between borrowing a connection and returning it to the pool.",
    ),
    _Convention("http", "open", "http.client.open_connections", "{connection}", _OPEN, (_HTTP_STATE, "active")),
    _Convention("http", "idle", "http.client.open_connections", "{connection}", _OPEN, (_HTTP_STATE, "idle")),
    _Convention(
        "http",
        "open_time",
        "http.client.connection.duration",
        "s",
        "The duration of the successfully established outbound HTTP connections.",
    ),
)

# A database's open connections are the sum over the states.
_COVERED = {("database", "open")} | {(each.kind, each.definition) for each in _CONVENTIONS}

_BY_NAME = {each.name: each for each in DEFINITIONS}


def _unit(definition: Definition) -> str:
    if definition.unit == "s":
        return "s"
    unit = definition.unit
    for plural, singular in (("ies", "y"), ("sses", "ss"), ("s", "")):
        if unit.endswith(plural):
            return "{" + unit.removesuffix(plural) + singular + "}"
    return "{" + unit + "}"


def _instruments() -> Iterator[Instrument]:
    for name in dict.fromkeys(each.name for each in _CONVENTIONS):
        found = [each for each in _CONVENTIONS if each.name == name]
        first = _BY_NAME[found[0].definition]
        yield Instrument(
            name,
            found[0].unit,
            _FORMS[first.type],
            found[0].meaning,
            tuple(Part(_BY_NAME[each.definition], each.kind, each.state) for each in found),
            first.bounds if first.type is MetricType.HISTOGRAM else (),
        )
    for each in DEFINITIONS:
        yield Instrument(
            each.opentelemetry,
            _unit(each),
            _FORMS[each.type],
            each.meaning,
            (Part(each),),
            each.bounds if each.type is MetricType.HISTOGRAM else (),
        )
    for number in OF_WORKERS:
        # A gauge: some are the maximum over the processes, which cannot be summed.
        each = number.definition
        yield Instrument(each.opentelemetry, _unit(each), Form.GAUGE, each.meaning)


#: The instruments of resources, followed by those of the worker in the order of :data:`OF_WORKERS`.
INSTRUMENTS = tuple(_instruments())

#: The alerts; with attributes for the rule and the resource.
ALERT = Instrument(
    "workerpools.alert.active", "1", Form.GAUGE, "Alerts of the worker's own rules: 1 while raised, 0 once cleared."
)


def applies(part: Part, kind: str) -> bool:
    """Return whether a part applies to resources of a kind."""
    return part.kind == kind or (part.kind is None and (kind, part.definition.name) not in _COVERED)


def attributes(part: Part, stats: ResourceStats, server: Server | None) -> dict[str, str | int]:
    """Return the attributes of a resource's statistic, except its label.

    Args:
        part: The statistic.
        stats: The resource.
        server: The host and port of its server; None if there is none or several.
    """
    found: dict[str, str | int]
    found = {POOL_NAME: stats.name} if part.kind == "database" else {"workerpools.resource": stats.name}
    if part.kind == "http" and server is not None:
        found["server.address"], found["server.port"] = server
    if part.state is not None:
        key, value = part.state
        found[key] = value
    return found


def measured(part: Part, stats: ResourceStats) -> list[tuple[Mapping[str, str], float]]:
    """Return the values of a resource's statistic, each with the attribute of its label, if any."""
    definition = part.definition
    if definition.values:
        labelled = stats.labelled(definition.name)
        return [({f"workerpools.{definition.label}": value}, int(number)) for value, number in labelled.items()]
    if part.state == (_HTTP_STATE, "active"):
        # With HTTP/2 several requests use one connection.
        return [({}, stats.open - stats.idle)]
    if definition.name == "limit" and not stats.limit:
        return []
    number = stats.value(definition.name)
    return [({}, number if definition.unit == "s" else int(number))]


class Recording(NamedTuple):
    """A value to record several times: the increase of a histogram's bucket."""

    bucket: int
    value: float
    times: int


def recordings(before: Histogram, after: Histogram) -> list[Recording]:
    """Return the increase of a histogram, one recording per bucket.

    A snapshot has a count per bucket and one sum, so all new values of a bucket are taken as equal. They fall into
    that bucket, and together add up to the increase of the sum.

    Args:
        before: The values recorded so far.
        after: The histogram now. A bucket below its earlier count was read during an update and adds nothing.
    """
    counts = [max(0, now - then) for then, now in zip(before.buckets, after.buckets, strict=True)]
    lowest = (0.0, *after.bounds)
    highest = (*after.bounds, max(after.max, math.nextafter(after.bounds[-1], math.inf)))
    least = sum(count * low for count, low in zip(counts, lowest, strict=True))
    most = sum(count * high for count, high in zip(counts, highest, strict=True))
    part = min(1.0, max(0.0, (after.sum - before.sum - least) / (most - least))) if most > least else 0.0
    return [
        # A bucket includes its upper bound and excludes its lower one.
        Recording(bucket, min(high, max(low + part * (high - low), math.nextafter(low, high) if low else 0.0)), count)
        for bucket, (count, low, high) in enumerate(zip(counts, lowest, highest, strict=True))
        if count
    ]


def added(before: Histogram, recorded: Iterable[Recording]) -> Histogram:
    """Return ``before`` with the recorded values added."""
    buckets, total, longest = list(before.buckets), before.sum, before.max
    for bucket, value, times in recorded:
        buckets[bucket] += times
        total += value * times
        longest = max(longest, value)
    return Histogram(tuple(buckets), total, longest, before.bounds)


def parts_of(instruments: Sequence[Instrument], form: Form) -> Iterator[tuple[Instrument, Part]]:
    """Yield the instruments of a form, with each of their parts."""
    return ((each, part) for each in instruments if each.form is form for part in each.parts)
