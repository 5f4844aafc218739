"""What does knowing that a connection is alive cost, one millisecond away from the database?

Tasks run in the tracer, in this process; the proxy is a process of its own. Read: begin, SELECT, commit; write the same
with an INSERT; READ ONLY: a read whose transaction says that it cannot write.

By hand a task takes three round trips, with a pre-ping four. Ours takes two: BEGIN, the deadline, the reset of the
session and what resolves a lost COMMIT travel with the first statement. What is left is the processor time of watching
and counting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.measure import Figure, Goal, alternate, at_least, block, paired
from benchmarks.result import Result
from benchmarks.servers import Servers, distant
from benchmarks.tracer import load, traced, worker_like

__all__ = ["FAR", "LIMIT", "NEEDS_SERVERS", "ROUND_TRIP", "run"]

NEEDS_SERVERS = True

#: What the proxy adds to a round trip, in seconds.
ROUND_TRIP = 0.001

#: What it adds to count round trips, in seconds.
FAR = 0.02

#: The soft time limit of the tasks with a deadline, in seconds.
LIMIT = 30.0


def run(servers: Servers, *, quick: bool) -> Result:
    """Compare our checks with SQLAlchemy's pre-ping and with none, with and without a deadline."""
    calls, rounds = (5, 2) if quick else (40, 31)
    with _sides(servers, ROUND_TRIP) as sides:
        samples = alternate({name: _sample(call, calls) for name, call in sides.items()}, rounds, budget=120.0)
    # Far enough away, a task takes its round trips and next to nothing else, however busy the machine is.
    with _sides(servers, FAR) as sides:
        trips = {
            name: min(block(call, 1, time.perf_counter) for _ in range(5)) / FAR / 1e6 for name, call in sides.items()
        }

    def faster(task: str, side: str, base: str, goal: Goal | None = None) -> Figure:
        # How many times as many tasks in the same time.
        return paired(samples[f"{task} {base}"], samples[f"{task} {side}"], goal)

    gain, none = at_least(1.25), at_least(1.3)
    ratios = {
        "read, pre_ping over no ping": faster("read", "pre_ping", "no_ping"),
        "read, ours checking every time, over pre_ping": faster("read", "checking", "pre_ping"),
        "read, resolver on over off": faster("read", "ours", "unresolved"),
        "write, resolver on over off": faster("write", "ours", "unresolved"),
        "write, ours over pre_ping": faster("write", "ours", "pre_ping"),
        "write, ours over no ping": faster("write", "ours", "no_ping", gain),
        "write, ours without resolver, over pre_ping": faster("write", "unresolved", "pre_ping"),
        "read, ours without resolver, over pre_ping": faster("read", "unresolved", "pre_ping", gain),
        "read, ours without resolver, over no ping": faster("read", "unresolved", "no_ping", none),
        "read with a deadline, without resolver, over pre_ping": faster(
            "read", "deadline unresolved", "pre_ping", gain
        ),
        "read with a deadline, without resolver, over no ping": faster("read", "deadline unresolved", "no_ping", none),
        "READ ONLY with a deadline, ours over pre_ping": faster("read", "read_only deadline", "pre_ping", gain),
        "READ ONLY with a deadline, ours over no ping": faster("read", "read_only deadline", "no_ping", none),
        "READ ONLY, ours over pre_ping": faster("read", "read_only", "pre_ping", gain),
        "READ ONLY, ours over no ping": faster("read", "read_only", "no_ping", none),
        "read with a deadline, ours over pre_ping": faster("read", "deadline", "pre_ping", gain),
        "read with a deadline, ours over no ping": faster("read", "deadline", "no_ping", none),
        "read, ours over no ping": faster("read", "ours", "no_ping", none),
        "read, ours over pre_ping": faster("read", "ours", "pre_ping", gain),
    }
    details = {
        "ms_a_task": {name: _median_ms(values) for name, values in samples.items()},
        "round_trips_a_task": {name: round(number, 1) for name, number in trips.items()},
    }
    return Result(
        "liveness",
        "What does it cost to know that a connection is alive, 1 ms away from the database?",
        ratios,
        quick=quick,
        details=details,
    )


@contextmanager
def _sides(servers: Servers, seconds: float) -> Iterator[dict[str, Callable[[], None]]]:
    """Give the functions that run one task each, ``seconds`` of round trip away from the database."""
    with distant(servers.postgres.host, servers.postgres.port, seconds) as (host, port):
        url = servers.database().replace(f"@{servers.postgres.host}:{servers.postgres.port}/", f"@{host}:{port}/")

        def app(name: str, **environment: str) -> Any:
            return load(name, {"BENCH_DATABASE": url, "BENCH_HTTP": servers.upstream.url, **environment})

        apps = {
            "no_ping": app("by_hand"),
            "pre_ping": app("by_hand", BENCH_PRE_PING="1"),
            "ours": app("ours"),
            "unresolved": app("ours", BENCH_RESOLVE="0"),
            "checking": app("ours", BENCH_CHECK_AFTER="0"),
        }
        sides: dict[str, Callable[[], None]] = {}
        with worker_like(apps["ours"].app):
            for task in ("read", "write"):
                for name, module in apps.items():
                    sides[f"{task} {name}"] = traced(getattr(module, task))
                sides[f"{task} deadline"] = traced(getattr(apps["ours"], task), soft_limit=LIMIT)
                sides[f"{task} deadline unresolved"] = traced(getattr(apps["unresolved"], task), soft_limit=LIMIT)
            sides["read read_only"] = traced(apps["ours"].read_only)
            sides["read read_only deadline"] = traced(apps["ours"].read_only, soft_limit=LIMIT)
            yield sides
        for module in apps.values():
            close = getattr(module, "close_clients", None) or module.pools.close
            close()


def _sample(call: Callable[[], None], calls: int) -> Callable[[], float]:
    return lambda: block(call, calls, time.perf_counter)


def _median_ms(microseconds: list[float]) -> float:
    return round(sorted(microseconds)[len(microseconds) // 2] / 1e3, 3)
