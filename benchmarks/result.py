"""What a benchmark gives: its figures, and the machine, versions and load they were measured with."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.measure import Figure

__all__ = ["FOLDER", "Result", "machine", "versions"]

#: Where results are kept between the runs and the report.
FOLDER = Path(__file__).parent / "results"

_DISTRIBUTIONS = (
    *("celery", "billiard", "kombu", "sqlalchemy", "psycopg2-binary", "httpx", "httpcore"),
    *("requests", "urllib3", "redis", "anyio"),
    *("celery-svcs", "svcs", "dependency-injector"),
)


@dataclass(frozen=True)
class Result:
    """The answer to one question.

    Attributes:
        name: The benchmark's name.
        question: What it answers, in a sentence.
        ratios: The figures by their labels; the last one is the benchmark's own answer.
        series: Lines for a plot, by label: pairs of x and y.
        axes: What x and y of the series are.
        quick: Whether it was a trial run, whose figures say nothing.
        details: Whatever else is worth keeping, such as counts.
    """

    name: str
    question: str
    ratios: Mapping[str, Figure]
    series: Mapping[str, list[tuple[float, float]]] = field(default_factory=dict)
    axes: tuple[str, str] = ("", "")
    quick: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the whole result, with where and when it was measured."""
        return {
            "name": self.name,
            "question": self.question,
            "quick": self.quick,
            "ratios": {label: figure.as_json() for label, figure in self.ratios.items()},
            "details": dict(self.details),
            "series": {label: [list(point) for point in line] for label, line in self.series.items()},
            "axes": list(self.axes),
            "machine": machine(),
            "versions": versions(),
        }

    def save(self, folder: Path = FOLDER) -> Path:
        """Write the result to ``<name>.json`` and return the path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def machine() -> dict[str, Any]:
    """Return what the figures depend on and cannot show: processor, memory, and how busy the machine is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "measured": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, of everything that is measured, and the commit."""
    found = {"python": platform.python_version(), "commit": _commit()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short", "HEAD")
        return f"{commit}, changed" if _git(folder, "status", "--porcelain", "--", "../workerpools") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
