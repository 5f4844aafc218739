"""The series of every worker on Flower's own `/metrics`."""

from __future__ import annotations

import contextlib

import pytest

from demo_tasks.servers import Workspace
from tests.support.flower import FlowerProcess
from tests.support.promtool import check_metrics
from tests.support.stand import Stand, wait_until
from tests.worker.scraping import fallen, fetch, series, total
from tests.worker.seeing import run

pytestmark = pytest.mark.worker


def test_flowers_metrics_have_our_series(stand: Stand) -> None:
    """Of each worker, beside Flower's own, accepted by promtool, and in agreement with what the servers saw. Nobody
    else looks: being scraped is what makes Flower ask."""
    with (
        stand.worker(concurrency=2, args=["--max-tasks-per-child", "5"]) as first,
        stand.worker(concurrency=2) as second,
        Workspace() as workspace,
        FlowerProcess(workspace, stand.broker_url) as flower,
    ):
        names = {worker.node for worker in (first, second)}

        def page() -> str:
            with contextlib.suppress(OSError):
                return fetch(flower.url("/metrics"))
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
        wait_until(lambda: total(series(page()), "workerpools_processes_running") == 4, "four children")
        text = page()
        assert total(series(text), "workerpools_connections_opened_total", resource="api") == stand.echo.accepted
        check_metrics(ours(text))
        # Flower's own are still there.
        assert any(name.startswith("flower_") for name, _ in series(text))
        assert second.stop() == 0
        (gone,) = names - {first.node}
        wait_until(
            lambda: gone not in {dict(labels).get("worker") for name, labels in series(page()) if "_attempts" in name},
            "no series of a worker that has ended",
        )


def ours(text: str) -> str:
    """Return the lines of an exposition that are ours: not all of the others' names are by the conventions."""
    return "".join(f"{line}\n" for line in text.splitlines() if "workerpools_" in line.split("{")[0])
