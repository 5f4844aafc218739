"""Whether connections are opened at many times the rate that was usual lately. Pure."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

__all__ = ["WINDOWS", "Creation", "Spike", "judged"]

#: How many windows before the present one say what is usual.
WINDOWS = 10

#: How many samples of a window are kept at most.
SAMPLES = 60


class Creation(NamedTuple):
    """What was seen of a counter of opened connections.

    Attributes:
        samples: ``(when, how many so far)``, the oldest first; counters that started over go on where they were.
        last: What the counter said last.
        spike: Since when there is a spike, and how many connections a window were usual before; None for none.
    """

    samples: tuple[tuple[float, float], ...] = ()
    last: float = 0.0
    spike: tuple[float, float] | None = None


class Spike(NamedTuple):
    """What is so now.

    Attributes:
        bad: Whether it is a spike.
        good: Whether it is none, with room to spare.
        recent: How many connections were opened within the last window.
        usual: How many a window are usual.
        threshold: How many are a spike.
    """

    bad: bool
    good: bool
    recent: float
    usual: float
    threshold: float


def judged(
    before: Creation, opened: float, now: float, *, factor: float, floor: float, window: float
) -> tuple[Creation, Spike]:
    """Return what is remembered from now on, and whether there is a spike.

    Nothing is judged before two windows have passed: a worker that starts opens its connections. Until there are ten
    before the present one, those that there were say what is usual.

    Args:
        before: What was remembered.
        opened: What the counter says.
        now: In seconds, on any clock that does not go back.
        factor: How many times as many as usual are a spike.
        floor: How many are none in any case.
        window: The length of a window, in seconds.
    """
    samples, spike = _continued(before, opened, now, window), before.spike
    edge = _last_until(samples, now - window)
    if spike is not None and now - spike[0] >= WINDOWS * window:
        # It has gone on for so long that it is what is usual now: what was before it says nothing any more.
        samples, edge, spike = samples[edge:], 0, None
    recent, past = samples[-1][1] - samples[edge][1], samples[edge][0] - samples[0][0]
    judge = past >= window
    usual = (samples[edge][1] - samples[0][1]) * window / past if judge else 0.0
    if spike is not None:
        # What a spike has opened does not make it usual while it lasts.
        usual = spike[1]
    threshold = max(floor, factor * usual)
    bad, good = judge and recent > threshold, not judge or recent <= threshold / 2
    if bad and spike is None:
        spike = now, usual
    elif good:
        spike = None
    return Creation(samples, opened, spike), Spike(bad, good, recent, usual, threshold)


def _continued(before: Creation, opened: float, now: float, window: float) -> tuple[tuple[float, float], ...]:
    samples = before.samples
    if not samples:
        return ((now, opened),)
    # A counter that started over has counted all of it since then.
    more = opened - before.last if opened >= before.last else opened
    new = (now, samples[-1][1] + more)
    # However often it is looked, a window has no more than so many samples.
    if len(samples) > 1 and now - samples[-2][0] < window / SAMPLES:
        samples = samples[:-1]
    # One sample from before the windows stays: it tells where they began.
    return (*samples[_last_until(samples, now - (WINDOWS + 1) * window) :], new)


def _last_until(samples: tuple[tuple[float, float], ...], when: float) -> int:
    return max(0, bisect_right(samples, when, key=lambda sample: sample[0]) - 1)
