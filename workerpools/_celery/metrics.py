"""Serves a worker's statistics to Prometheus from its main process, where a port is configured."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from celery import bootsteps, signals

from workerpools._celery.bootstep import snapshots
from workerpools._celery.settings import read_setting

__all__ = ["HOST", "MetricsStep"]

logger = logging.getLogger("workerpools")

#: Without a setting nobody from outside reaches it: there is neither a password nor TLS.
HOST = "127.0.0.1"


class MetricsStep(bootsteps.StartStopStep):
    """Starts the endpoint after the execution pool, and leaves it until the last task of a warm stop has ended."""

    # The thread need not exist when the first children are forked. Later ones discard its sockets.
    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **_: Any) -> None:
        self._endpoint: Any = None
        self._worker: Any = None
        self._uid = f"workerpools-metrics-{id(self)}"

    def start(self, worker: Any) -> None:
        port = read_setting(worker.app.conf, "metrics_port", None)
        if port is None or self._endpoint is not None:
            return
        host = read_setting(worker.app.conf, "metrics_host", HOST)
        try:
            # By its name: the core of the package does not depend on its integrations.
            prometheus = import_module("workerpools.prometheus")
            endpoint = prometheus.serve(lambda: {worker.hostname: snapshots(worker.app, worker)}, host, port)
        except ImportError as error:
            logger.error(
                "workerpools_metrics_port is set, but the worker's statistics are not served: %s",
                error,
            )
        except OSError as error:
            logger.error(
                "the worker's statistics are not served: workerpools_metrics_host %s and workerpools_metrics_port %d "
                "cannot be listened on: %s; each worker of a machine needs a port of its own",
                host,
                port,
                error.strerror or error,
            )
        else:
            logger.info("the worker's statistics are served at http://%s:%d/metrics", host, endpoint.port)
            self._endpoint, self._worker = endpoint, worker
            signals.worker_shutdown.connect(self._worker_ended, weak=False, dispatch_uid=self._uid)

    def stop(self, worker: Any) -> None:
        """Do nothing: the tasks that a warm stop waits for are to be seen."""

    def terminate(self, worker: Any) -> None:
        self._close()

    def _worker_ended(self, sender: Any = None, **_: Any) -> None:
        # Of a worker that tells who it is, another app's in this process is of no interest.
        if sender is self._worker or not hasattr(sender, "app"):
            self._close()

    def _close(self) -> None:
        endpoint, self._endpoint = self._endpoint, None
        self._worker = None
        signals.worker_shutdown.disconnect(dispatch_uid=self._uid)
        if endpoint is not None:
            endpoint.close()
