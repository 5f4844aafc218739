"""The application of these tests, with an OpenTelemetry exporter in its worker's main process."""

from __future__ import annotations

import math
import os
from typing import Any

from celery import signals
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader

from tests.worker.shop import app, pools
from workerpools.opentelemetry import instrument

__all__ = ["app"]


@signals.worker_init.connect(weak=False)
def worker_starts(sender: Any, **_: Any) -> None:
    """Before the fork: the children inherit all of it."""
    # A file stands for the collector.
    exporter = ConsoleMetricExporter(
        out=open(os.environ["SHOP_METRICS"], "a"),  # noqa: SIM115 - as long as the process
        formatter=lambda data: data.to_json(indent=None).replace("\n", "") + "\n",
    )
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=math.inf)
    instrument(pools, MeterProvider([reader]), export_interval=0.2)
