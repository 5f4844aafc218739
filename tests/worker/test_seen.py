"""What the processes of a worker count is seen from outside, and agrees with what happened."""

from __future__ import annotations

import pytest

from tests.support.worker import WorkerProcess
from tests.worker.stand import Stand, wait_until
from workerpools._core.stats import ResourceStats, WorkerStats

pytestmark = pytest.mark.worker


def look(stand: Stand, worker: WorkerProcess) -> WorkerStats:
    """Return what ``celery inspect pools`` answers."""

    def ask() -> list[dict[str, object]]:
        (*_, answer) = [{}, *stand.client.control.inspect(timeout=5.0, limit=1)._request("pools").values()]
        return answer or []

    (stats,) = wait_until(ask, "an answer to inspect pools")
    return WorkerStats.from_dict(stats)


def total(stats: WorkerStats, name: str) -> ResourceStats:
    return next(each for each in stats.totals() if each.name == name)


def test_look(shared: Stand) -> None:
    with shared.worker() as worker:
        shared.reach_all(worker.children())
        print(look(shared, worker).to_dict())
        print(shared.client.control.inspect(timeout=5.0, limit=1).stats())
        print(worker.log())
