"""How many tasks a second does a real prefork worker run, by the way it keeps its connections?

Two children. All workers are up all the time; each in its turn gets a burst of tasks that were published before.

A task of the database benchmark is one SELECT over loopback. Ours takes a round trip less, and pays the processor time
of watching and counting its connection.
"""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.measure import Figure, alternate, at_least, paired, quartiles
from benchmarks.result import Result
from benchmarks.servers import Servers
from benchmarks.workers import Worker, rate_of

__all__ = ["NEEDS_SERVERS", "run"]

NEEDS_SERVERS = True

PEERS = {
    "by_hand": "hand-written",
    "svcs": "celery-svcs",
    "injector": "dependency-injector",
    "on_task": "_db = None on the task",
}


def run(servers: Servers, *, quick: bool) -> Result:
    """Compare pooled connections with one a task, and ours with those of the peers."""
    pooled, single, rounds = (40, 10, 2) if quick else (400, 60, 9)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(servers, name)) for name in ("ours", *PEERS, "per_task")}
        for worker in workers.values():
            worker.ready()
        samples: dict[str, list[float]] = {}
        for task in ("read", "get"):
            sides = {
                f"{task} {name}": rate_of(worker, task, single if name == "per_task" else pooled)
                for name, worker in workers.items()
            }
            samples.update(alternate(sides, rounds, budget=85.0))
        # The two that are closest get more rounds.
        close = {
            f"{task} {name} again": rate_of(workers[name], task, pooled)
            for task in ("read", "get")
            for name in ("ours", "by_hand")
        }
        samples.update(alternate(close, rounds, budget=60.0))

    def over(task: str, peer: str, goal: float | None = None, again: str = "") -> Figure:
        ours, theirs = samples[f"{task} ours"], samples[f"{task} {peer}"]
        if again:
            ours, theirs = ours + samples[f"{task} ours again"], theirs + samples[f"{task} {peer} again"]
        return paired(ours, theirs, at_least(goal) if goal else None)

    ratios = {f"{task}, ours": quartiles(samples[f"{task} ours"], "tasks/s") for task in ("read", "get")}
    for peer in ("svcs", "injector", "on_task"):
        for task in ("read", "get"):
            ratios[f"{task}, ours over {PEERS[peer]}"] = over(task, peer)
    ratios["HTTP, ours over a client a task"] = over("get", "per_task", 10.0)
    ratios["database, ours over an engine a task"] = over("read", "per_task", 4.0)
    ratios["HTTP, ours over hand-written"] = over("get", "by_hand", 0.98, "again")
    ratios["database, ours over hand-written"] = over("read", "by_hand", 0.98, "again")
    return Result(
        "throughput",
        "How many tasks a second does a worker run, by the way it keeps its connections?",
        ratios,
        quick=quick,
        details={"children": 2, "tasks_per_second": {name: round(_median(rates)) for name, rates in samples.items()}},
    )


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
