"""What does knowing that a connection is alive cost, one millisecond away from the database?

Tasks run in the tracer, in this process; the proxy is a process of its own. Read: begin, SELECT, commit; write the same
with an INSERT.

By hand a task takes three round trips, with a pre-ping four. Ours takes two: BEGIN, the deadline, the reset of the
session and what resolves a lost COMMIT travel with the first statement. Where a goal is missed, it is by processor
time: that of watching and counting in Python, and that of the statements which travel along, in driver and server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from benchmarks.measure import Figure, Goal, alternate, at_least, at_most, block, paired
from benchmarks.result import Result
from benchmarks.servers import Servers, distant
from benchmarks.tracer import load, traced, worker_like

__all__ = ["DRIVERS", "FAR", "LIMIT", "NEEDS_SERVERS", "ROUND_TRIP", "run"]

NEEDS_SERVERS = True

#: The drivers, of which the first is compared in more ways.
DRIVERS = ("psycopg2", "psycopg")

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
        samples = alternate({name: _sample(call, calls) for name, call in sides.items()}, rounds, budget=240.0)
        compared = {
            name: sides[name] for driver in DRIVERS for name in (f"{driver} read no_ping", f"{driver} read ours")
        }
        busy = alternate({name: _sample(call, calls, time.thread_time) for name, call in compared.items()}, rounds)
    # Far enough away, a task takes its round trips and next to nothing else, however busy the machine is.
    with _sides(servers, FAR) as sides:
        trips = {
            name: min(block(call, 1, time.perf_counter) for _ in range(5)) / FAR / 1e6 for name, call in sides.items()
        }

    def faster(task: str, side: str, base: str, goal: Goal | None = None) -> Figure:
        # How many times as many tasks in the same time.
        return paired(samples[f"{task} {base}"], samples[f"{task} {side}"], goal)

    figures = {
        "read, pre_ping over no ping": faster("psycopg2 read", "pre_ping", "no_ping"),
        "read, ours checking every time, over pre_ping": faster("psycopg2 read", "checking", "pre_ping"),
    }
    for driver in DRIVERS:
        read, write = f"{driver} read", f"{driver} write"
        figures[f"{driver}: read, ours over no ping"] = faster(read, "ours", "no_ping", at_least(1.3))
        figures[f"{driver}: read with a deadline, ours over no ping"] = faster(
            read, "deadline", "no_ping", at_least(1.3)
        )
        figures[f"{driver}: write, ours over no ping"] = faster(write, "ours", "no_ping", at_least(1.25))
        figures[f"{driver}: read, ours over pre_ping"] = faster(read, "ours", "pre_ping", at_least(1.25))
        figures[f"{driver}: processor time of a read, over no ping"] = paired(
            busy[f"{read} ours"], busy[f"{read} no_ping"], at_most(40.0), difference="µs"
        )
    details = {
        "ms_a_task": {name: _median_ms(values) for name, values in samples.items()},
        "round_trips_a_task": {name: round(number, 1) for name, number in trips.items()},
    }
    return Result(
        "liveness",
        "What does it cost to know that a connection is alive, 1 ms away from the database?",
        figures,
        quick=quick,
        details=details,
    )


@contextmanager
def _sides(servers: Servers, seconds: float) -> Iterator[dict[str, Callable[[], None]]]:
    """Give the functions that run one task each, ``seconds`` of round trip away from the database."""
    with distant(servers.postgres.host, servers.postgres.port, seconds) as (host, port):
        url = servers.database().replace(f"@{servers.postgres.host}:{servers.postgres.port}/", f"@{host}:{port}/")
        with ExitStack() as stack:
            sides: dict[str, Callable[[], None]] = {}
            for driver in DRIVERS:
                given = {
                    "BENCH_DATABASE": url.replace("+psycopg2:", f"+{driver}:"),
                    "BENCH_HTTP": servers.upstream.url,
                }
                apps = {
                    "no_ping": load("by_hand", given),
                    "pre_ping": load("by_hand", {**given, "BENCH_PRE_PING": "1"}),
                    "ours": load("ours", given),
                    "checking": load("ours", {**given, "BENCH_CHECK_AFTER": "0"}),
                }
                for module in apps.values():
                    stack.callback(getattr(module, "close_clients", None) or module.pools.close)
                if driver == DRIVERS[0]:
                    stack.enter_context(worker_like(apps["ours"].app))
                for task in ("read", "write"):
                    for name, module in apps.items():
                        sides[f"{driver} {task} {name}"] = traced(getattr(module, task))
                    sides[f"{driver} {task} deadline"] = traced(getattr(apps["ours"], task), soft_limit=LIMIT)
            yield sides


def _sample(
    call: Callable[[], None], calls: int, clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    return lambda: block(call, calls, clock)


def _median_ms(microseconds: list[float]) -> float:
    return round(sorted(microseconds)[len(microseconds) // 2] / 1e3, 3)
