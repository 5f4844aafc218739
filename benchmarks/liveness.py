"""What does knowing that a connection is alive cost, one millisecond away from the database?

Tasks run in the tracer, in this process; the proxy is a process of its own. Read: begin, SELECT, commit; write the same
with an INSERT.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.measure import Figure, Goal, alternate, at_least, block, paired
from benchmarks.result import Result
from benchmarks.servers import Servers, distant
from benchmarks.tracer import load, traced, worker_like

__all__ = ["NEEDS_SERVERS", "ROUND_TRIP", "run"]

NEEDS_SERVERS = True

#: What the proxy adds to a round trip, in seconds.
ROUND_TRIP = 0.001

_LIMIT = 30.0


def run(servers: Servers, *, quick: bool) -> Result:
    """Compare our checks with SQLAlchemy's pre-ping and with none, with and without a deadline."""
    calls, rounds = (5, 2) if quick else (40, 31)
    with distant(servers.postgres.host, servers.postgres.port, ROUND_TRIP) as (host, port):
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
        sides: dict[str, Callable[[], float]] = {}
        with worker_like(apps["ours"].app):
            for task in ("read", "write"):
                for name, module in apps.items():
                    sides[f"{task} {name}"] = _sample(getattr(module, task), calls)
                sides[f"{task} deadline"] = _sample(apps["ours"].__dict__[task], calls, _LIMIT)
                sides[f"{task} deadline unresolved"] = _sample(apps["unresolved"].__dict__[task], calls, _LIMIT)
            samples = alternate(sides, rounds, budget=200.0)

    def faster(task: str, side: str, base: str, goal: Goal | None = None) -> Figure:
        # How many times as many tasks in the same time.
        return paired(samples[f"{task} {base}"], samples[f"{task} {side}"], goal)

    gain, none = at_least(1.25), at_least(0.98)
    ratios = {
        "read, pre_ping over no ping": faster("read", "pre_ping", "no_ping"),
        "read, ours checking every time, over pre_ping": faster("read", "checking", "pre_ping"),
        "read, resolver on over off": faster("read", "ours", "unresolved"),
        "write, resolver on over off": faster("write", "ours", "unresolved"),
        "write, ours over pre_ping": faster("write", "ours", "pre_ping"),
        "write, ours over no ping": faster("write", "ours", "no_ping"),
        "write, ours without resolver, over pre_ping": faster("write", "unresolved", "pre_ping"),
        "read, ours without resolver, over pre_ping": faster("read", "unresolved", "pre_ping", gain),
        "read, ours without resolver, over no ping": faster("read", "unresolved", "no_ping", none),
        "read with a deadline, without resolver, over pre_ping": faster(
            "read", "deadline unresolved", "pre_ping", gain
        ),
        "read with a deadline, without resolver, over no ping": faster("read", "deadline unresolved", "no_ping", none),
        "read with a deadline, ours over pre_ping": faster("read", "deadline", "pre_ping", gain),
        "read with a deadline, ours over no ping": faster("read", "deadline", "no_ping", none),
        "read, ours over no ping": faster("read", "ours", "no_ping", none),
        "read, ours over pre_ping": faster("read", "ours", "pre_ping", gain),
    }
    details = {
        "round_trip_ms": ROUND_TRIP * 1e3,
        "ms_a_task": {name: _median_ms(values) for name, values in samples.items()},
    }
    return Result(
        "liveness",
        "What does knowing that a connection is alive cost, a millisecond away from the database?",
        ratios,
        quick=quick,
        details=details,
    )


def _sample(task: Any, calls: int, limit: float | None = None) -> Callable[[], float]:
    call = traced(task, soft_limit=limit)
    return lambda: block(call, calls, time.perf_counter)


def _median_ms(microseconds: list[float]) -> float:
    return round(sorted(microseconds)[len(microseconds) // 2] / 1e3, 3)
