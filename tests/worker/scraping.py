"""Scraping a worker, and reading what it has exported."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.support.worker import WorkerProcess

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def address(worker: WorkerProcess) -> tuple[str, int]:
    """Return the host and port that a worker has logged."""
    worker.wait_for_log("serving metrics at ")
    found = re.findall(r"serving metrics at http://([\d.]+):(\d+)/metrics", worker.log())
    assert len(found) == 1
    return found[0][0], int(found[0][1])


def fetch(url: str) -> str:
    """Return what a server of this machine answers."""
    with _DIRECT.open(url, timeout=30) as response:
        return str(response.read().decode())


def scrape(worker: WorkerProcess) -> str:
    """Return a worker's exposition."""
    host, port = address(worker)
    return fetch(f"http://{host}:{port}/metrics")


def series(text: str) -> Series:
    """Return an exposition's samples by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(found: Series, name: str, **labels: str) -> float:
    """Return the sum of the samples of a name that have these labels."""
    return sum(value for (own, pairs), value in found.items() if own == name and labels.items() <= set(pairs))


def fallen(before: Series, after: Series) -> list[object]:
    """Return the counters and buckets that are less than before, or gone."""
    ends = ("_total", "_bucket", "_count", "_sum")
    return [key for key, value in before.items() if key[0].endswith(ends) and after.get(key, -1.0) < value]


def exported(path: Path) -> list[dict[str, Any]]:
    """Return each export that `tests.worker.exporting` has written, as its data points by metric."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [_points(json.loads(line)) for line in lines]


def _points(data: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {
        metric["name"]: metric["data"]["data_points"]
        for resource in data["resource_metrics"]
        for scope in resource["scope_metrics"]
        for metric in scope["metrics"]
    }


def summed(points: Mapping[str, Any], name: str, **attributes: object) -> float:
    """Return the sum of a metric's values, or of its histograms' counts, where it has these attributes."""
    wanted = {key.replace("__", "."): value for key, value in attributes.items()}
    found = [each for each in points.get(name, ()) if wanted.items() <= each["attributes"].items()]
    return sum(each["count"] if "count" in each else each["value"] for each in found)
