"""The series of every worker on Flower's own `/metrics`."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.paths import environment
from tests.support.promtool import check_metrics
from tests.worker.scraping import fallen, fetch, series, total
from tests.worker.seeing import run
from tests.worker.stand import SHOP, Stand, wait_until

pytestmark = pytest.mark.worker

# Flower looks at its workers when it starts, and when somebody opens a page: here a timer does it.
CONFIGURATION = """
import flower.app
from tornado.ioloop import PeriodicCallback

from workerpools._core.stats import WorkerStats
from workerpools.prometheus import register

start = flower.app.Flower.start


def started(self):
    def source():
        told = {name: info.get("stats", {}).get("workerpools") for name, info in list(self.workers.items())}
        return {
            name: [WorkerStats.from_dict(each) for each in found["snapshots"]] for name, found in told.items() if found
        }

    register(source)
    PeriodicCallback(self.update_workers, 200).start()
    start(self)


flower.app.Flower.start = started
"""


@contextmanager
def flower(stand: Stand, folder: Path) -> Iterator[str]:
    """Run Flower with that configuration; gives the address of its `/metrics`."""
    configuration = folder / "flowerconfig.py"
    configuration.write_text(CONFIGURATION)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "celery", "-A", SHOP, "flower", "--address=127.0.0.1", f"--port={port}"]
    command += [f"--conf={configuration}", "--inspect-timeout=1000"]
    with (folder / "flower.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment(stand.environment()), cwd=folder
        )
        try:
            yield f"http://127.0.0.1:{port}/metrics"
        finally:
            process.kill()
            process.wait()


def test_flowers_metrics_have_our_series(stand: Stand, tmp_path: Path) -> None:
    """Of each worker, beside Flower's own, accepted by promtool, and in agreement with what the servers saw."""
    with (
        stand.worker(concurrency=2, args=["--max-tasks-per-child", "5"]) as first,
        stand.worker(concurrency=2) as second,
        flower(stand, tmp_path) as url,
    ):
        names = {worker.name.replace("%h", socket.gethostname()) for worker in (first, second)}

        def page() -> str:
            with contextlib.suppress(OSError):
                return fetch(url)
            return ""

        wait_until(
            lambda: names == {dict(labels).get("worker") for name, labels in series(page()) if "_attempts" in name},
            "both workers on the page",
        )
        before = series(page())
        for _ in range(3):
            run(stand, 20)
            after = series(page())
            assert fallen(before, after) == []
            before = after
        wait_until(
            lambda: total(series(page()), "workerpools_attempts_total", resource="db") == 60, "what all tasks have done"
        )
        wait_until(lambda: total(series(page()), "workerpools_processes_running") == 4, "the last successors")
        text = page()
        found = series(text)
        assert total(found, "workerpools_connections_opened_total", resource="api") == stand.echo.accepted
        check_metrics(ours(text))
        # Flower's own are still there.
        assert any(name.startswith("flower_") for name, _ in found)


def ours(text: str) -> str:
    """Return the lines of an exposition that are ours: not all of the others' names are by the conventions."""
    return "".join(f"{line}\n" for line in text.splitlines() if "workerpools_" in line.split("{")[0])
