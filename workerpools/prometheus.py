"""The statistics of workers as Prometheus' series.

Made from snapshots alone, whenever somebody asks: nothing is kept, no file is written, and children need no port of
their own. A worker's main process can serve them (the setting ``workerpools_metrics_port``), and so can Flower.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf

from workerpools._text import explained

try:
    from prometheus_client import REGISTRY, CollectorRegistry, make_wsgi_app
except ModuleNotFoundError as error:
    raise explained(error, "workerpools.prometheus", "prometheus_client", "prometheus", "prometheus-client") from None

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from workerpools._stats.endpoint import Endpoint
from workerpools._stats.export import OF_WORKERS, Raised, raised, resources, words
from workerpools._stats.metrics import DEFINITIONS, Definition, Kind
from workerpools._stats.snapshot import ResourceStats, WorkerStats

__all__ = ["Source", "WorkerPoolsCollector", "register", "serve"]

#: Returns the snapshots of each worker, by its name.
Source = Callable[[], Mapping[str, Sequence[WorkerStats]]]

logger = logging.getLogger("workerpools")

PREFIX = "workerpools"
ALERT = "workerpools_alert_active"


def series_name(definition: Definition) -> str:
    """Return the name of the series of a definition, without the suffixes of a histogram's.

    Units are base units in the plural, and counters end in ``total``
    (https://prometheus.io/docs/practices/naming/).
    """
    parts = [PREFIX, *words(definition)]
    if definition.unit == "s":
        parts.append("seconds")
    if definition.kind is Kind.COUNTER:
        parts.append("total")
    return "_".join(parts)


class WorkerPoolsCollector(Collector):
    """Answers with what its source knows at the moment; see :func:`register`.

    Args:
        source: Asked each time. It must not block where whoever collects must not, as in Flower's event loop.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        # Alerts that were raised once are told as cleared afterwards, so that they do not end as a gap.
        self._known: dict[str, set[Raised]] = {}
        self._lock = threading.Lock()

    def describe(self) -> list[Metric]:
        """Return the families without samples: registering asks nobody for numbers."""
        return [
            *(_family(each) for each in DEFINITIONS),
            *(_of_worker(each.definition) for each in OF_WORKERS),
            _alerts(),
        ]

    def collect(self) -> Iterator[Metric]:
        """Return the families with a sample for each worker and resource."""
        try:
            workers = {name: list(snapshots) for name, snapshots in sorted(self.source().items())}
        except Exception:
            # It costs these series alone, and not everything else that the registry shows.
            logger.exception("the statistics of the workers cannot be read: the series workerpools_… are missing")
            return
        totals = {name: resources(snapshots) for name, snapshots in workers.items()}
        for definition in DEFINITIONS:
            family = _family(definition)
            for worker, found in totals.items():
                for each in found:
                    _add(family, definition, worker, each)
            yield family
        for number in OF_WORKERS:
            gauge = _of_worker(number.definition)
            for worker, snapshots in workers.items():
                value = number.value(snapshots)
                if value is not None:
                    gauge.add_metric([worker], value)
            yield gauge
        yield self._alerts(workers)

    def _alerts(self, workers: Mapping[str, Sequence[WorkerStats]]) -> Metric:
        gauge = _alerts()
        with self._lock:
            self._known = {
                worker: self._known.get(worker, set()) | raised(snapshots) for worker, snapshots in workers.items()
            }
            known = self._known
        for worker, snapshots in workers.items():
            now = raised(snapshots)
            for alert in sorted(known[worker]):
                gauge.add_metric([worker, alert.resource, alert.rule], float(alert in now))
        return gauge


def _family(definition: Definition) -> CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily:
    labels = ["worker", "resource", *([definition.label] if definition.label else [])]
    name = series_name(definition)
    if definition.kind is Kind.COUNTER:
        return CounterMetricFamily(name, definition.meaning, labels=labels)
    if definition.kind is Kind.HISTOGRAM:
        return HistogramMetricFamily(name, definition.meaning, labels=labels)
    return GaugeMetricFamily(name, definition.meaning, labels=labels)


def _of_worker(definition: Definition) -> GaugeMetricFamily:
    return GaugeMetricFamily(series_name(definition), definition.meaning, labels=["worker"])


def _alerts() -> GaugeMetricFamily:
    return GaugeMetricFamily(
        ALERT,
        "Alerts of the workers' own rules: 1 while raised, 0 once cleared.",
        labels=["worker", "resource", "rule"],
    )


def _add(
    family: CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily,
    definition: Definition,
    worker: str,
    stats: ResourceStats,
) -> None:
    labels = [worker, stats.name]
    if isinstance(family, HistogramMetricFamily):
        histogram = stats.histogram(definition.name)
        buckets = [("+Inf" if bound == inf else str(bound), float(count)) for bound, count in histogram.cumulative()]
        family.add_metric(labels, buckets, histogram.sum)
    elif definition.values:
        for value, number in stats.labelled(definition.name).items():
            family.add_metric([*labels, value], number)
    elif definition.name != "limit" or stats.limit:
        # Without a limit there is no series: a rule that divides by it finds nothing, rather than infinity.
        family.add_metric(labels, stats.value(definition.name))


_registered: weakref.WeakKeyDictionary[CollectorRegistry, WorkerPoolsCollector] = weakref.WeakKeyDictionary()


def register(source: Source, registry: CollectorRegistry = REGISTRY) -> WorkerPoolsCollector:
    """Have ``registry`` show what ``source`` knows. A second call for the same registry replaces the source.

    Args:
        source: Returns the snapshots of each worker by its name; asked at each collection, in its thread.
        registry: By default the one that ``prometheus_client`` and Flower expose.

    Returns:
        The collector; ``registry.unregister()`` takes it away again.
    """
    collector = _registered.get(registry)
    if collector is None:
        collector = WorkerPoolsCollector(source)
    collector.source = source
    try:
        registry.register(collector)
    except ValueError:
        # It is there already, unless somebody else has its names.
        if registry not in _registered:
            raise
    _registered[registry] = collector
    return collector


def serve(source: Source, host: str, port: int) -> Endpoint:
    """Serve what ``source`` knows over HTTP, in a thread of this process that no child inherits.

    The registry is one of its own: collecting another one takes the locks of its metrics, and a child that is forked
    meanwhile would find them taken for ever.

    Args:
        source: Asked at each request, in that thread.
        host: The address to listen on.
        port: The port; 0 for any that is free.

    Raises:
        OSError: It cannot be listened on.
    """
    registry = CollectorRegistry()
    registry.register(WorkerPoolsCollector(source))
    return Endpoint(make_wsgi_app(registry), host, port)
