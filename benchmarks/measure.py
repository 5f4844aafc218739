"""Alternation, pairs, medians and quartiles: how two things are compared on a machine that does other work, too."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Figure", "Goal", "alternate", "at_least", "at_most", "block", "paired", "quartiles"]


@dataclass(frozen=True)
class Goal:
    """What a figure should reach.

    Attributes:
        value: In the figure's unit.
        at_least: Whether more is better.
    """

    value: float
    at_least: bool

    def reached(self, value: float) -> bool:
        """Return whether ``value`` reaches the goal."""
        return value >= self.value if self.at_least else value <= self.value

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.value:g}"


def at_least(value: float) -> Goal:
    """Return the goal of reaching ``value`` or more."""
    return Goal(value, True)


def at_most(value: float) -> Goal:
    """Return the goal of staying at or below ``value``."""
    return Goal(value, False)


@dataclass(frozen=True)
class Figure:
    """A median with its quartiles.

    Attributes:
        median: Half of the samples are below.
        low: A quarter of the samples is below.
        high: A quarter of the samples is above.
        samples: How many there are.
        unit: ``×`` for a ratio, else what is counted.
        goal: What it should reach; None where it is there to compare with.
    """

    median: float
    low: float
    high: float
    samples: int
    unit: str = "×"
    goal: Goal | None = field(default=None)

    @property
    def holds(self) -> bool | None:
        """Whether the median reaches the goal; None without one."""
        return None if self.goal is None else self.goal.reached(self.median)

    def as_json(self) -> dict[str, object]:
        """Return what is written to a result file."""
        return {
            "median": self.median,
            "low": self.low,
            "high": self.high,
            "samples": self.samples,
            "unit": self.unit,
            "goal": None if self.goal is None else str(self.goal),
            "holds": self.holds,
        }


def quartiles(samples: Iterable[float], unit: str = "×", goal: Goal | None = None) -> Figure:
    """Return the median and the quartiles of ``samples``, of which there must be one at least."""
    found = sorted(samples)
    low, median, high = statistics.quantiles(found * 2 if len(found) == 1 else found, n=4, method="inclusive")
    return Figure(median, low, high, len(found), unit, goal)


def paired(
    ours: Sequence[float],
    theirs: Sequence[float],
    goal: Goal | None = None,
    *,
    difference: str = "",
) -> Figure:
    """Compare samples that were taken side by side: what both suffered from is in neither the ratio nor the difference.

    Args:
        ours: One sample a round.
        theirs: The other side's samples of the same rounds.
        goal: What the median should reach.
        difference: The unit, to subtract instead of dividing.
    """
    pairs = list(zip(ours, theirs, strict=True))
    if difference:
        return quartiles([one - other for one, other in pairs], difference, goal)
    return quartiles([one / other for one, other in pairs], "×", goal)


def alternate(
    sides: Mapping[str, Callable[[], float]], rounds: int, *, budget: float = math.inf
) -> dict[str, list[float]]:
    """Take one sample of each side a round: A B C, then C B A, so that a trend favours nobody.

    Args:
        sides: Take a sample each. Each runs once before, and that sample is thrown away.
        rounds: How many samples each side gives.
        budget: After so many seconds no further round is begun; there are three at least, if three are wanted.
    """
    started = time.monotonic()
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for sample in sides.values():
        sample()
    for number in range(rounds):
        if number >= 3 and time.monotonic() - started > budget:
            break
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in order:
            samples[name].append(sides[name]())
    return samples


def block(call: Callable[[], object], calls: int, clock: Callable[[], float] = time.thread_time) -> float:
    """Return the microseconds a call takes, over ``calls`` calls.

    Args:
        call: What is measured.
        calls: How often it is called.
        clock: In seconds; by default the thread's own CPU time, which other processes do not lengthen.
    """
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls * 1e6
