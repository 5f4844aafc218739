"""What do requests, redis and `async def` bodies reach in a real prefork worker, beside clients kept by hand?

Two children. By hand, a client per process is made after the fork, and coroutines run on one event loop per process, on
the child's main thread. `asyncio.run` makes a loop and a client for each task. Each task sends one request or one
INCR over loopback, and does nothing else: any work of its own brings the ratios nearer to 1.
"""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.measure import alternate, at_least, paired, quartiles
from benchmarks.result import Result
from benchmarks.servers import Servers
from benchmarks.workers import Worker, rate_of

__all__ = ["NEEDS_SERVERS", "run"]

NEEDS_SERVERS = True

#: What each task uses.
TASKS = {"ask": "requests", "count": "redis", "fetch": "async httpx"}


def run(servers: Servers, *, quick: bool) -> Result:
    """Compare each client of ours with one kept by hand, and an async body with `asyncio.run`."""
    pooled, alone, rounds = (40, 10, 2) if quick else (400, 60, 15)
    with ExitStack() as stack:
        apps = {"ours": "clients_ours", "by_hand": "clients_by_hand"}
        workers = {name: stack.enter_context(Worker(servers, app)) for name, app in apps.items()}
        for worker in workers.values():
            worker.ready()
        samples: dict[str, list[float]] = {}
        for task in TASKS:
            sides = {f"{task} {name}": rate_of(worker, task, pooled) for name, worker in workers.items()}
            samples.update(alternate(sides, rounds, budget=60.0))
        sides = {
            "fetch ours, again": rate_of(workers["ours"], "fetch", pooled),
            "fetch_alone": rate_of(workers["by_hand"], "fetch_alone", alone),
        }
        samples.update(alternate(sides, 2 if quick else 5, budget=40.0))
    ratios = {f"{shown}, ours": quartiles(samples[f"{task} ours"], "tasks/s") for task, shown in TASKS.items()}
    ratios["async body over asyncio.run per task"] = paired(
        samples["fetch ours, again"], samples["fetch_alone"], at_least(3.0)
    )
    for task, shown in TASKS.items():
        ratios[f"{shown}, ours over hand-written"] = paired(
            samples[f"{task} ours"], samples[f"{task} by_hand"], at_least(0.98)
        )
    return Result(
        "clients",
        "What do requests, redis and async def bodies reach, beside clients kept by hand?",
        ratios,
        quick=quick,
        details={
            "children": 2,
            "tasks_per_second": {name: round(sorted(rates)[len(rates) // 2]) for name, rates in samples.items()},
        },
    )
