"""The statistics of workers as OpenTelemetry metrics, named by its semantic conventions.

Metrics are computed from snapshots in one process: a worker's main process, a script or a web process. Nothing is
recorded where connections are used, so tasks pay nothing, children need no exporter, and a killed child loses nothing.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from workerpools._text import explained

try:
    from opentelemetry import metrics
except ModuleNotFoundError as error:
    raise explained(error, "workerpools.opentelemetry", "opentelemetry", "opentelemetry", "opentelemetry-api") from None

from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
from opentelemetry.metrics import Histogram as HistogramInstrument

from workerpools._stats.snapshot import (
    OF_WORKERS,
    Histogram,
    OfWorker,
    Raised,
    ResourceStats,
    WorkerStats,
    raised,
    resources,
)
from workerpools.opentelemetry._conventions import (
    ALERT,
    INSTRUMENTS,
    SCHEMA_URL,
    Form,
    Instrument,
    Recording,
    added,
    applies,
    attributes,
    measured,
    parts_of,
    recordings,
)
from workerpools.opentelemetry._recording import record

if TYPE_CHECKING:
    from workerpools._celery.pools import WorkerPools

__all__ = ["instrument", "uninstrument"]

logger = logging.getLogger("workerpools")

#: The maximum number of recordings per collection, about 0.1 s. Only aggregations other than explicit buckets need it.
RECORDINGS = 10_000

#: How long a stopping worker waits for an export in progress, in seconds.
JOIN = 10.0


class _Instruments:
    """The instruments of one meter provider. They cannot be removed, so they outlive the pools they observe."""

    def __init__(self, provider: MeterProvider) -> None:
        self.pools: weakref.WeakSet[WorkerPools] = weakref.WeakSet()
        self._snapshots: list[WorkerStats] = []
        self._resources: tuple[ResourceStats, ...] = ()
        self._servers: dict[str, tuple[str, int] | None] = {}
        self._asked: set[str] = set()
        self._alerts: set[Raised] = set()
        self._recorded: dict[tuple[str, str], Histogram] = {}
        self._forget()
        os.register_at_fork(after_in_child=_calling(weakref.WeakMethod(self._forget)))
        meter = metrics.get_meter("workerpools", meter_provider=provider, schema_url=SCHEMA_URL)
        self._histograms: dict[str, HistogramInstrument] = {}
        for each in INSTRUMENTS[: -len(OF_WORKERS)]:
            if each.form is Form.HISTOGRAM:
                self._histograms[each.name] = meter.create_histogram(
                    each.name, each.unit, each.meaning, explicit_bucket_boundaries_advisory=list(each.bounds)
                )
            else:
                _create(meter, each, self._observing(each))
        for each, number in zip(INSTRUMENTS[-len(OF_WORKERS) :], OF_WORKERS, strict=True):
            _create(meter, each, self._observing_worker(each, number))
        _create(meter, ALERT, self._observe_alerts)

    def _forget(self) -> None:
        # A child starts from zero, and may have been forked while a thread of its parent held the lock.
        self._lock = threading.RLock()
        self._asked.clear()
        self._recorded.clear()

    def _collecting(self, name: str) -> None:
        """Take a snapshot once for all instruments; an instrument's second call begins another collection."""
        if self._asked and name not in self._asked:
            self._asked.add(name)
            return
        self._asked = {name}
        pools = [each for each in self.pools if each.collector.answers]
        self._snapshots = [each.stats() for each in pools]
        self._resources = resources(self._snapshots)
        self._servers = {
            resource.name: getattr(resource.adapter, "server", None) for each in pools for resource in each.resources
        }
        left = RECORDINGS
        for each, part in parts_of(INSTRUMENTS, Form.HISTOGRAM):
            for stats in self._resources:
                if applies(part, stats.kind):
                    found = attributes(part, stats, self._server(stats))
                    left -= self._record(each, stats, part.definition.name, found, left)

    def _record(self, each: Instrument, stats: ResourceStats, name: str, found: dict[str, Any], limit: int) -> int:
        """Record a histogram's new values; those beyond the limit are left to the next collection."""
        key, after = (each.name, stats.name), stats.histogram(name)
        before = self._recorded.get(key) or Histogram(bounds=after.bounds)
        histogram, done, used = self._histograms[each.name], list[Recording](), 0
        for recording in recordings(before, after):
            times, calls = record(histogram, recording.value, recording.times, found, limit - used)
            done.append(recording._replace(times=times))
            used += calls
        self._recorded[key] = added(before, done)
        return used

    def _server(self, stats: ResourceStats) -> tuple[str, int] | None:
        return self._servers.get(stats.name)

    def _observing(self, each: Instrument) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(options: CallbackOptions) -> list[Observation]:
            with self._lock:
                self._collecting(each.name)
                return list(self._observations(each))

        return observe

    def _observations(self, each: Instrument) -> Iterator[Observation]:
        for stats in self._resources:
            for part in each.parts:
                if applies(part, stats.kind):
                    found = attributes(part, stats, self._server(stats))
                    for label, value in measured(part, stats):
                        yield Observation(value, {**found, **label})

    def _observing_worker(
        self, each: Instrument, number: OfWorker
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(options: CallbackOptions) -> list[Observation]:
            with self._lock:
                self._collecting(each.name)
                value = number.value(self._snapshots) if self._snapshots else None
                return [] if value is None else [Observation(value)]

        return observe

    def _observe_alerts(self, options: CallbackOptions) -> list[Observation]:
        with self._lock:
            self._collecting(ALERT.name)
            now = raised(self._snapshots)
            self._alerts |= now
            return [
                Observation(float(each in now), {"workerpools.rule": each.rule, "workerpools.resource": each.resource})
                for each in sorted(self._alerts)
            ]


def _create(
    meter: metrics.Meter, each: Instrument, callback: Callable[[CallbackOptions], Iterable[Observation]]
) -> None:
    create = {
        Form.COUNTER: meter.create_observable_counter,
        Form.UP_DOWN_COUNTER: meter.create_observable_up_down_counter,
        Form.GAUGE: meter.create_observable_gauge,
    }[each.form]
    create(each.name, [callback], each.unit, each.meaning)


def _calling(method: weakref.WeakMethod[Any]) -> Callable[[], None]:
    def call() -> None:
        if (found := method()) is not None:
            found()

    return call


class _Exporting:
    """A thread that makes a provider export periodically; a forked child does not have it.

    Args:
        provider: The meter provider.
        interval: The time between two exports, in seconds.
    """

    def __init__(self, provider: Any, interval: float) -> None:
        self._provider = provider
        self._interval = interval
        self._pid = os.getpid()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="workerpools-opentelemetry", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            self._export()

    def _export(self) -> None:
        try:
            self._provider.force_flush()
        except Exception:
            logger.warning("could not export the statistics; the next export will include them", exc_info=True)

    def close(self) -> None:
        """Export once more, then stop."""
        if self._pid == os.getpid() and not self._ended.is_set():
            self._ended.set()
            # An export in progress has the SDK's own time limit.
            self._thread.join(JOIN)
            self._export()

    @property
    def ended(self) -> bool:
        """Whether exporting has stopped."""
        return self._ended.is_set()


_instruments: weakref.WeakKeyDictionary[MeterProvider, _Instruments] = weakref.WeakKeyDictionary()
_exporting: weakref.WeakKeyDictionary[WorkerPools, _Exporting] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def instrument(
    pools: WorkerPools, meter_provider: MeterProvider | None = None, *, export_interval: float | None = None
) -> None:
    """Export the statistics of ``pools`` as metrics. Idempotent for the same pools and provider.

    Call it in the process that reports for its children: in a worker, the main process. In a child that inherits the
    instruments, they export nothing, as its parent does so.

    Args:
        pools: The WorkerPools whose resources are exported.
        meter_provider: The meter provider; None for the global one, which may be set later.
        export_interval: Time between exports in seconds, by a thread that forked children do not have. For a provider
            whose reader has no thread (``PeriodicExportingMetricReader(exporter, export_interval_millis=math.inf)``):
            in each child the SDK restarts the thread of any other reader, on the connection that its exporter opened
            before the fork. None for a provider that exports by itself. A worker exports once more at shutdown, after
            its last task.

    Raises:
        ValueError: ``export_interval`` is not above 0, or the provider has no ``force_flush()``.
    """
    provider = metrics.get_meter_provider() if meter_provider is None else meter_provider
    if export_interval is not None:
        if not export_interval > 0:
            raise ValueError(f"export_interval is {export_interval!r}; wanted: a number of seconds above 0")
        if not callable(getattr(provider, "force_flush", None)):
            raise ValueError(
                f"export_interval needs a meter provider of the SDK, not {type(provider).__name__}; "
                "pass one as meter_provider, or set the global one first"
            )
    with _lock:
        found = _instruments.get(provider)
        if found is None:
            found = _instruments[provider] = _Instruments(provider)
        found.pools.add(pools)
        running = _exporting.get(pools)
        if export_interval is not None and (running is None or running.ended):
            _exporting[pools] = exporting = _Exporting(provider, export_interval)
            pools.collector.at_end(exporting.close)


def uninstrument(pools: WorkerPools) -> None:
    """Stop exporting the statistics of ``pools``, after a last export if it has an ``export_interval``.

    Args:
        pools: A WorkerPools passed to :func:`instrument`; any other is ignored.
    """
    with _lock:
        exporting = _exporting.pop(pools, None)
    if exporting is not None:
        exporting.close()
    with _lock:
        for found in list(_instruments.values()):
            found.pools.discard(pools)
