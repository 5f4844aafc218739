"""What counting costs, and publishing, and a snapshot of many children: processor time, in this process alone.

Run: ``python -m benchmarks.counting``.
"""

from __future__ import annotations

import json
import time
import timeit
from collections.abc import Callable

from workerpools._run.attempts import Attempt
from workerpools._stats.alerts import State, evaluate, stopped_among
from workerpools._stats.collector import assemble
from workerpools._stats.memory import Board
from workerpools._stats.meter import Meter
from workerpools._stats.rules import Thresholds
from workerpools._stats.snapshot import ProcessStats, WorkerStats

CHILDREN = 64
RESOURCES = ("api", "db", "stock")


def microseconds(function: Callable[[], object], number: int = 20_000) -> float:
    """Return the least processor time of one call, in microseconds, over many rounds."""
    # Of the thread, not of the wall: others use the machine, too.
    return min(timeit.repeat(function, number=number, repeat=15, timer=time.thread_time)) / number * 1e6


def main() -> None:
    """Print one line for each."""
    board = Board.anonymous()
    slot = board.claim(0)
    assert slot is not None
    meters = [Meter() for _ in RESOURCES]
    for meter, name in zip(meters, RESOURCES, strict=True):
        meter.show(slot, slot.place(name, "") or 0)
    meter, attempt = meters[0], Attempt()

    def use() -> None:
        lease = meter.wait()
        lease.acquired()
        lease.returned()

    def two() -> None:
        meters[0].attempt_ended(attempt)
        meters[1].attempt_ended(attempt)

    print(f"publish one resource:                      {microseconds(meter.publish):8.2f} µs")
    print(f"end of an attempt with one resource:       {microseconds(lambda: meter.attempt_ended(attempt)):8.2f} µs")
    print(f"end of an attempt with two:                {microseconds(two):8.2f} µs")
    print(f"acquire, use and give back, counted:       {microseconds(use):8.2f} µs")

    def deep(function: Callable[[], object], calls: int) -> Callable[[], object]:
        # As deep as httpx's calls are below a task in a worker.
        return function if calls == 0 else lambda: deep_one(deep(function, calls - 1))

    def deep_one(function: Callable[[], object]) -> object:
        return function()

    meter.leak_after = None
    without = microseconds(deep(use, 15))
    meter.leak_after = 60.0
    print(f"... and with its stack kept (leak_after):  {microseconds(deep(use, 15)) - without:8.2f} µs more")
    meter.leak_after = None

    for index in range(CHILDREN):
        taken = board.claim(index)
        assert taken is not None
        for each, name in zip(meters, RESOURCES, strict=True):
            taken.publish(taken.row(taken.place(name, "") or 0), each.row)

    def snapshot() -> WorkerStats:
        return assemble(
            board.read(lambda pid: True),
            ProcessStats(1),
            execution_pool="prefork",
            alive=lambda pid: True,
            children=(),
            now=time.time(),
            monotonic=time.monotonic(),
        )

    def reply() -> str:
        return json.dumps(snapshot().to_dict())

    state = State()

    def look() -> None:
        nonlocal state
        state = evaluate(state, snapshot(), time.monotonic(), Thresholds(), stopped_among(range(1, CHILDREN + 1))).state

    print(f"take over a slot:                          {microseconds(lambda: board.claim(0), 50):8.2f} µs")
    print(f"a reply for {CHILDREN} children and {len(RESOURCES)} resources:    {microseconds(reply, 5) / 1000:8.2f} ms")
    print(f"its size:                                  {len(reply()) / 1000:8.1f} kB")
    print(f"a look for alerts among all of these:      {microseconds(look, 5) / 1000:8.2f} ms")


if __name__ == "__main__":
    main()
