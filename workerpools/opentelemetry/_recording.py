"""Records many equal values in an SDK histogram at once.

The API records values one by one, about 10 µs each, and has no observable histogram; the Python SDK has no metric
producer. So the first of several equal values is recorded through the API, and the others are added to the
explicit-bucket aggregation that took it, under its lock. If the SDK's private attributes differ from those expected, or
a view chose another aggregation, all values are recorded through the API, a bounded number per collection.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any

from opentelemetry.metrics import Histogram

__all__ = ["record"]


def record(
    histogram: Histogram, value: float, times: int, attributes: Mapping[str, Any], limit: int
) -> tuple[int, int]:
    """Record a value several times, with at most ``limit`` calls of the API.

    Call it only in an observable instrument's callback: the SDK then holds its collection lock, and no reader removes
    an aggregation between two steps.

    Args:
        histogram: The histogram.
        value: The value.
        times: The number of times to record it.
        attributes: The attributes of the value.
        limit: The maximum number of API calls.

    Returns:
        The number of values recorded and the number of API calls.
    """
    if times < 1 or limit < 1:
        return 0, 0
    histogram.record(value, attributes)
    if times == 1:
        return 1, 1
    found = _aggregations(histogram, attributes)
    if found is None:
        calls = min(times, limit)
        for _ in range(calls - 1):
            histogram.record(value, attributes)
        return calls, calls
    for aggregation in found:
        with aggregation._lock:
            aggregation._value[bisect_left(aggregation._boundaries, value)] += times - 1
            aggregation._sum += value * (times - 1)
    return times, 1


def _aggregations(histogram: Histogram, attributes: Mapping[str, Any]) -> list[Any] | None:
    """Return each reader's aggregation for these attributes; None unless all of them are as expected."""
    # The global provider returns proxies until it is set.
    instrument: Any = getattr(histogram, "_real_instrument", None) or histogram
    try:
        storages = instrument._measurement_consumer._reader_storages.values()
        return list(_found(storages, instrument, dict(attributes)))
    except (AttributeError, LookupError):
        return None


def _found(storages: Any, instrument: Any, attributes: dict[str, Any]) -> Iterator[Any]:
    for storage in storages:
        for match in storage._instrument_view_instrument_matches[instrument]:
            if type(match._aggregation).__name__ == "_DropAggregation":
                continue
            kept = match._view._attribute_keys
            wanted = attributes if kept is None else {key: attributes[key] for key in attributes if key in kept}
            # There is none beyond the SDK's limit of attribute sets: the value went to the overflow set.
            (found,) = [each for each in match._attributes_aggregation.values() if each._attributes == wanted] or [None]
            if type(found).__name__ != "_ExplicitBucketHistogramAggregation":
                raise LookupError(instrument)
            # Initialised by the first value.
            if found._lock is None or found._sum is None or len(found._value) != len(found._boundaries) + 1:
                raise LookupError(instrument)
            yield found
