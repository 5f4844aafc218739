"""The statistics of workers as Prometheus series.

The series are computed from snapshots on each scrape: nothing is stored, no file is written, and children need no
ports. A worker's main process can serve them (the setting ``workerpools_metrics_port``), with answers for liveness and
readiness probes beside them, and so can Flower.
"""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

from workerpools._process import fork
from workerpools._text import explained

try:
    from prometheus_client import REGISTRY, CollectorRegistry, make_wsgi_app
except ModuleNotFoundError as error:
    raise explained(error, "workerpools.prometheus", "prometheus_client", "prometheus", "prometheus-client") from None

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from workerpools._stats.metrics import DEFINITIONS, Definition, MetricType
from workerpools._stats.snapshot import OF_WORKERS, Raised, ResourceStats, WorkerStats, raised, resources

__all__ = ["Source", "WorkerPoolsCollector", "register", "serve"]

#: Returns the snapshots of each worker, by worker name.
Source = Callable[[], Mapping[str, Sequence[WorkerStats]]]

#: Returns checks: the name of each, whether it passed, and the reason.
Probe = Callable[[], Sequence[tuple[str, bool, str]]]

logger = logging.getLogger("workerpools")

ALERT = "workerpools_alert_active"


class WorkerPoolsCollector(Collector):
    """Collects the current statistics of its source; see :func:`register`.

    Args:
        source: Called on each collection, in the collecting thread; must not block where that thread must not, as in
            Flower's event loop.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        # Alerts raised earlier are exported as cleared, so that their series do not end in a gap.
        self._known: dict[str, set[Raised]] = {}
        self._lock = threading.Lock()

    def describe(self) -> list[Metric]:
        """Return the families without samples, so that registering does not call the source."""
        return [
            *(_family(each) for each in DEFINITIONS),
            *(_of_worker(each.definition) for each in OF_WORKERS),
            _alerts(),
        ]

    def collect(self) -> Iterator[Metric]:
        """Yield the families, with samples per worker and resource."""
        try:
            workers = {name: list(snapshots) for name, snapshots in sorted(self.source().items())}
        except Exception:
            # Lose only these series, not the registry's others.
            logger.exception("cannot read the workers' statistics; the workerpools_… series are missing")
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
    name = definition.prometheus
    if definition.type is MetricType.COUNTER:
        return CounterMetricFamily(name, definition.meaning, labels=labels)
    if definition.type is MetricType.HISTOGRAM:
        return HistogramMetricFamily(name, definition.meaning, labels=labels)
    return GaugeMetricFamily(name, definition.meaning, labels=labels)


def _of_worker(definition: Definition) -> GaugeMetricFamily:
    return GaugeMetricFamily(definition.prometheus, definition.meaning, labels=["worker"])


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
        # No series without a limit: a rule that divides by it then yields nothing instead of infinity.
        family.add_metric(labels, stats.value(definition.name))


_registered: weakref.WeakKeyDictionary[CollectorRegistry, WorkerPoolsCollector] = weakref.WeakKeyDictionary()


def register(source: Source, registry: CollectorRegistry = REGISTRY) -> WorkerPoolsCollector:
    """Export the statistics of ``source`` through ``registry``. A second call for a registry replaces the source.

    Args:
        source: Returns the snapshots of each worker, by worker name; called on each collection, in its thread.
        registry: The registry; by default the one that ``prometheus_client`` and Flower expose.

    Returns:
        The collector; ``registry.unregister()`` removes it.

    Raises:
        ValueError: The registry already has series with these names.
    """
    collector = _registered.get(registry)
    if collector is None:
        collector = WorkerPoolsCollector(source)
    collector.source = source
    try:
        registry.register(collector)
    except ValueError:
        # Already registered, unless another collector uses its names.
        if registry not in _registered:
            raise
    _registered[registry] = collector
    return collector


#: How long a client may take to send its request, in seconds; each occupies a thread.
TIMEOUT = 10.0


class _Handler(WSGIRequestHandler):
    timeout = TIMEOUT

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: scrapes are frequent."""


class _Server(ThreadingWSGIServer):
    """The server of ``prometheus_client.start_http_server()``, with four changes.

    It tracks its accepted sockets, which a forked child must discard; it never shares its port; it does not resolve
    the host's name; and it drops silent clients.
    """

    block_on_close = False
    # Two workers sharing a port would each get half of the requests.
    allow_reuse_port = False

    def __init__(self, host: str, port: int) -> None:
        self.accepted: set[socket.socket] = set()
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.accepted.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        try:
            super().shutdown_request(request)
        finally:
            self.accepted.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""


def _application(metrics: Any, probes: Mapping[str, Probe]) -> Any:
    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        probe = probes.get(environ.get("PATH_INFO", ""))
        if probe is None:
            return metrics(environ, start_response)
        checks = probe()
        status = "200 OK" if all(passed for _, passed, _ in checks) else "503 Service Unavailable"
        # As the probes of Kubernetes itself write them.
        lines = [f"[{'+' if passed else '-'}] {name}: {told}\n" for name, passed, told in checks]
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")])
        return ["".join(lines).encode()]

    return application


class Endpoint:
    """Serves a registry over HTTP in a thread of this process, until closed.

    A forked child discards its sockets: the listening one would keep the port in use after the parent's death, and an
    accepted one would keep its client waiting.

    Args:
        registry: The registry, collected on each request.
        host: The address to listen on.
        port: The port; 0 for any free port.
        probes: Answers to other paths than the metrics'.

    Raises:
        OSError: The address is in use or does not belong to this machine.
    """

    def __init__(self, registry: Collector, host: str, port: int, probes: Mapping[str, Probe] | None = None) -> None:
        self._server: _Server | None = _Server(host, port)
        self.host, self.port = host, int(self._server.server_port)
        self._server.set_app(_application(make_wsgi_app(registry), probes or {}))
        fork.guard(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="workerpools-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening. Idempotent; does nothing in a forked child."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            self._thread.join(1.0)

    def pin(self) -> object:
        """Return the objects that must not be finalized in a forked child (see :mod:`workerpools._process.fork`)."""
        server = self._server
        return (server, list(server.accepted)) if server is not None else ()

    def discard(self) -> tuple[object, Sequence[int]]:
        """Give up the inherited sockets in a forked child; return them and their descriptors."""
        server, self._server = self._server, None
        if server is None:
            return (), ()
        sockets = [server.socket, *server.accepted]
        return (server, sockets), [each.fileno() for each in sockets if each.fileno() >= 0]


def serve(source: Source, host: str, port: int, probes: Mapping[str, Probe] | None = None) -> Endpoint:
    """Serve the statistics of ``source`` over HTTP, in a thread of this process.

    Uses a separate registry: collecting a shared one takes the locks of its metrics, which would stay locked in a
    child forked meanwhile.

    Args:
        source: Returns the snapshots of each worker, by worker name; called on each request, in a thread of the
            endpoint.
        host: The address to listen on.
        port: The port; 0 for any free port.
        probes: Answers to other paths than the metrics': checks by path, 200 if all passed, else 503.

    Returns:
        The endpoint, with ``host`` and ``port``; ``close()`` stops it.

    Raises:
        OSError: The address is in use or does not belong to this machine.
    """
    registry = CollectorRegistry()
    registry.register(WorkerPoolsCollector(source))
    return Endpoint(registry, host, port, probes)
