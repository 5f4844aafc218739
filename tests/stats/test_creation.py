"""What is a spike of opened connections."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workerpools._stats.rules import SAMPLES, WINDOWS, Creation, judged


def story(
    opened: Iterable[float], *, step: float = 60.0, floor: float = 20.0, start_over: int | None = None
) -> list[str]:
    """Return what is said after each step, in which so many connections were opened."""
    state, total, said = Creation(), 0.0, list[str]()
    for number, more in enumerate(opened):
        if number == start_over:
            total = 0.0
        total += more
        state, spike = judged(state, total, number * step, factor=5.0, floor=floor, window=60.0)
        said.append("bad" if spike.bad else "good" if spike.good else "between")
    return said


@pytest.mark.parametrize(
    ("opened", "last"),
    [
        # A worker that starts: nothing is usual yet.
        ([500], "good"),
        ([0, 500], "good"),
        ([0, 0, 500], "bad"),
        # Small numbers are none, whatever was before.
        ([0] * 10 + [20], "between"),
        ([0] * 10 + [21], "bad"),
        ([0] * 10 + [10], "good"),
        # Five times what is usual.
        ([10] * 10 + [50], "between"),
        ([10] * 10 + [51], "bad"),
        ([10] * 10 + [25], "good"),
        # Busy all the time, or more and more by and by.
        ([500] * 30, "good"),
        ([10 * 1.2**n for n in range(30)], "good"),
        # Bursts that come every few minutes are usual.
        (([0, 0, 0, 100] * 10), "between"),
    ],
)
def test_when_there_is_a_spike(opened: list[float], last: str) -> None:
    """Beyond the floor, and beyond a multiple of what was usual within the ten windows before."""
    assert story(opened)[-1] == last


def test_a_spike_does_not_make_itself_usual() -> None:
    """It goes on for as long as the connections are opened, but not for ever: then it is what is usual."""
    said = story([2] * 10 + [200] * 40)
    assert said[10 : 10 + WINDOWS] == ["bad"] * WINDOWS
    assert "bad" not in said[10 + WINDOWS :]


def test_a_spike_that_ends() -> None:
    """Is over with its window."""
    assert story([2] * 10 + [200, 200, 2, 2])[-4:] == ["bad", "bad", "good", "good"]


def test_a_counter_that_starts_over_is_no_spike() -> None:
    """It goes on from where it was."""
    assert "bad" not in story([30] * 20, start_over=12)
    assert story([2] * 10 + [200], start_over=10)[-1] == "bad"


def test_looking_more_often_says_the_same() -> None:
    """A spike of one second is seen for as long as it lies within the window."""
    said = story([0.0] * 300 + [100.0] + [0.0] * 100, step=1.0)
    assert said[300] == "bad"
    assert said[355] == "bad"
    assert said[365] == "good"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.001, 200.0), st.floats(0, 1000)), max_size=80), st.floats(1.1, 10), st.floats(1, 50)
)
def test_what_always_holds(steps: list[tuple[float, float]], factor: float, floor: float) -> None:
    """Never both, never below the floor, never on less than two windows; and the samples do not pile up."""
    state, now, start = Creation(), 0.0, None
    for pause, opened in steps:
        now += pause
        start = now if start is None else start
        state, spike = judged(state, opened, now, factor=factor, floor=floor, window=10.0)
        assert not (spike.bad and spike.good)
        assert spike.recent >= 0
        assert spike.usual >= 0
        if spike.bad:
            assert spike.recent > floor
            assert spike.recent > factor * spike.usual
            assert now - start >= 20.0
        assert [when for when, _ in state.samples] == sorted(when for when, _ in state.samples)
        assert len(state.samples) <= (WINDOWS + 2) * SAMPLES + 3
