"""Looking at a worker from outside, as `celery inspect` does."""

from __future__ import annotations

from typing import Any

from tests.support.stand import PATIENCE, Stand, wait_until
from workerpools._stats.snapshot import ProcessStats, ResourceStats, WorkerStats

TASKS = 40


def ask(stand: Stand, command: str) -> Any:
    """Return the answer of the one worker to an inspect command."""

    def answers() -> Any:
        # Over a connection of its own: one of the client's that is idle between two questions may be lost by the next,
        # which is not what is tested.
        with stand.client.connection_for_write() as connection:
            return stand.client.control.broadcast(command, reply=True, timeout=5.0, limit=1, connection=connection)

    (answer,) = wait_until(answers, f"an answer to {command}")
    (found,) = answer.values()
    return found


def look(stand: Stand) -> WorkerStats:
    """Return what ``celery inspect pools`` answers."""
    (stats,) = ask(stand, "pools")
    return WorkerStats.from_dict(stats)


def of(resources: tuple[ResourceStats, ...], name: str) -> ResourceStats:
    return next(each for each in resources if each.name == name)


def total(stats: WorkerStats, name: str) -> ResourceStats:
    return of(stats.totals(), name)


def by_pid(stats: WorkerStats) -> dict[int, ProcessStats]:
    return {process.pid: process for process in stats.processes}


def run(stand: Stand, count: int = TASKS) -> list[dict[str, Any]]:
    """Run tasks that each use the client and the session once."""
    sent = [stand.send("visit", f"token-{number}") for number in range(count)]
    return [result.get(timeout=PATIENCE) for result in sent]


def grown(before: WorkerStats, after: WorkerStats) -> bool:
    """Return whether no counter fell."""
    for each in before.totals():
        now = of(after.totals(), each.name)
        for name in ("opened", "closed", "reused", "attempts", "failures", "replays"):
            if now.value(name) < each.value(name):
                return False
        if any(a < b for a, b in zip(now.histogram("use_time").buckets, each.histogram("use_time").buckets)):  # noqa: B905
            return False
    return True
