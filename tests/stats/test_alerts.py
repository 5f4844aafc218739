"""When alerts are raised and cleared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stats.pictures import EPOCH, process, resource, worker
from workerpools._stats.alerts import State, evaluate
from workerpools._stats.rules import RULES, Thresholds
from workerpools._stats.snapshot import Alert, WorkerStats

THRESHOLDS = Thresholds(leak_after={"db": 30.0})
STEP = 5.0


class Story:
    """Evaluates one snapshot after the other, and keeps what changed, with when."""

    def __init__(self, thresholds: Thresholds = THRESHOLDS) -> None:
        self.thresholds = thresholds
        self.state = State()
        self.now = 0.0
        self.changes: list[tuple[float, str, str, str]] = []

    def look(self, stats: WorkerStats | Callable[[float], WorkerStats], stopped: Iterable[int] = ()) -> None:
        picture = stats(self.now) if callable(stats) else stats
        outcome = evaluate(self.state, picture, self.now, self.thresholds, frozenset(stopped))
        self.state = outcome.state
        for what, alerts in (("cleared", outcome.cleared), ("raised", outcome.raised)):
            self.changes += [(self.now, what, alert.rule, alert.resource) for alert in alerts]

    def go_on(
        self, seconds: float, *resources: Any, step: float = STEP, stopped: Iterable[int] = (), **how: Any
    ) -> None:
        end = self.now + seconds
        while self.now < end:
            self.look(lambda now: worker(now, process(1, *resources, **how)), stopped)
            self.now += step

    @property
    def alert(self) -> Alert:
        (alert,) = self.state.alerts.values()
        return alert

    def rules(self) -> list[str]:
        return [rule for rule, _ in self.state.alerts]


BUSY = resource(limit=10, in_use=9, open=9)
NEARLY = resource(limit=10, in_use=8, open=8)
CALM = resource(limit=10, in_use=7, open=9)


def test_utilisation_must_last() -> None:
    """Raised after a minute of it, cleared after a minute without it; with when it began, not when it was told."""
    story = Story()
    story.go_on(20, CALM)
    story.go_on(60, BUSY)
    assert story.changes == []
    story.go_on(5, BUSY)
    assert story.changes == [(80.0, "raised", "utilisation", "db")]
    assert (story.alert.since, story.alert.pid, story.alert.value) == (EPOCH + 20, 1, 0.9)
    assert story.alert.message == "9 of 10 connections of 'db' in use in process 1"
    story.go_on(60, CALM)
    assert story.rules() == ["utilisation"]
    story.go_on(5, CALM)
    assert story.changes[1:] == [(145.0, "cleared", "utilisation", "db")]


@pytest.mark.parametrize(
    ("pictures", "raised"),
    [
        ([BUSY] * 13, True),
        ([BUSY] * 12, False),
        # One look at which it was well: it was not above all the time.
        ([BUSY] * 6 + [CALM] + [BUSY] * 12, False),
        # At the threshold is not above it.
        ([NEARLY] * 30, False),
        ([BUSY] * 6 + [NEARLY] + [BUSY] * 12, False),
        ([resource(limit=0, in_use=50, open=50)] * 30, False),
        # With HTTP/2 more requests than connections are in use.
        ([resource(limit=10, in_use=50, open=2)] * 30, False),
        ([resource(limit=10, in_use=50, open=9)] * 13, True),
        # Not known how many are open: what is in use is.
        ([resource(limit=10, in_use=9)] * 13, True),
    ],
)
def test_what_counts_as_lasting(pictures: list[Any], raised: bool) -> None:
    """Every look must find it, and a worker without limits has no utilisation."""
    story = Story()
    for picture in pictures:
        story.go_on(STEP, picture)
    assert ("utilisation" in story.rules()) is raised


def test_between_the_thresholds_nothing_changes() -> None:
    """An alert goes on at 75 %: it would flap about 80 % otherwise."""
    story = Story()
    story.go_on(65, BUSY)
    story.go_on(600, resource(limit=100, in_use=75, open=80))
    assert story.rules() == ["utilisation"]
    story.go_on(65, resource(limit=100, in_use=72, open=80))
    assert story.rules() == []


def test_two_looks_far_apart_prove_nothing() -> None:
    """The main process was stopped for an hour: nobody knows what was in between."""
    story = Story()
    story.go_on(5, BUSY)
    story.now += 3600
    story.go_on(5, BUSY)
    assert story.rules() == []
    story.go_on(5, BUSY)
    assert story.rules() == ["utilisation"]


def test_one_alert_for_all_processes() -> None:
    """A hundred children raise one, which tells the worst of them and how many there are; and it ends with the last."""
    story = Story()

    def of(pids: Iterable[int]) -> Callable[[float], WorkerStats]:
        return lambda now: worker(
            now, *(process(pid, resource(limit=200, in_use=170 + pid, open=200)) for pid in pids), process(0, CALM)
        )

    for _ in range(14):
        story.look(of(range(1, 21)))
        story.now += STEP
    assert story.changes == [(60.0, "raised", "utilisation", "db")]
    assert (story.alert.pid, story.alert.value) == (None, 0.95)
    assert story.alert.message.endswith("process 20, and 19 more like that")
    # All but one are killed.
    for _ in range(20):
        story.look(of([7]))
        story.now += STEP
    assert len(story.changes) == 1
    assert (story.alert.pid, story.alert.value) == (7, 0.885)
    for _ in range(14):
        story.look(of([]))
        story.now += STEP
    assert story.changes[1:] == [(230.0, "cleared", "utilisation", "db")]


def test_a_killed_child_takes_its_trouble_along() -> None:
    """What is gone is well, after the time that every alert needs to end."""
    story = Story()
    story.go_on(65, BUSY, tokens=0)
    assert sorted(story.rules()) == ["budget_empty", "utilisation"]
    end = story.now + 65
    while story.now < end:
        story.look(lambda now: worker(now, process(2, CALM)))
        story.now += STEP
    assert story.rules() == []


def test_waits_are_compared_with_those_before() -> None:
    """A long wait raises at once, and is news once; what was counted before the first look is not."""
    story = Story()
    story.go_on(10, resource(waits_above=3, longest=9.0))
    assert story.changes == []
    story.go_on(5, resource(waits_above=4, longest=9.5))
    assert story.changes == [(10.0, "raised", "acquire_wait", "db")]
    assert (story.alert.value, story.alert.threshold, story.alert.pid) == (9.5, 5.0, None)
    story.go_on(60, resource(waits_above=4, longest=9.5))
    assert story.rules() == ["acquire_wait"]
    story.go_on(5, resource(waits_above=4, longest=9.5))
    assert story.rules() == []
    # One that is no longer than the longest before it: so much is known.
    story.go_on(5, resource(waits_above=5, longest=9.5))
    assert story.alert.value == 5.0


def test_who_waits_now_is_seen_before_the_wait_is_over() -> None:
    """As soon as it is too long."""
    story = Story()
    story.go_on(5, resource(pending=1, longest_wait=5.0))
    assert story.rules() == []
    story.go_on(5, resource(pending=1, longest_wait=5.1))
    assert story.alert.value == 5.1
    assert story.alert.message == "a caller is waiting for a connection of 'db' for 5.1 s"


def test_a_resource_that_is_new_has_only_news() -> None:
    """It was opened, and a caller waited, between two looks."""
    story = Story()
    story.go_on(5)
    story.go_on(5, resource(waits_above=1, longest=6.0))
    assert story.rules() == ["acquire_wait"]


@pytest.mark.parametrize(("after", "raised"), [(0, False), (2, True)])
def test_counters_that_start_over(after: int, raised: bool) -> None:
    """What they say then was counted since."""
    story = Story()
    story.go_on(10, resource(waits_above=5, leaks=5))
    story.go_on(5, resource(waits_above=after, leaks=after))
    assert (sorted(story.rules()) == ["acquire_wait", "leak_suspected"]) is raised


@pytest.mark.parametrize(
    ("how", "rule", "message"),
    [
        ({"tokens": 4}, "budget_empty", "4 of 500 tokens left for replays in process 1"),
        ({"tokens": 5}, "", ""),
        # Replays are turned off, or never could be paid.
        ({"tokens": 0, "capacity": 0}, "", ""),
        ({"tokens": 3, "capacity": 3}, "", ""),
    ],
)
def test_an_empty_budget(how: dict[str, Any], rule: str, message: str) -> None:
    """One that cannot pay for a replay, where it ever could."""
    story = Story()
    story.go_on(5, **how)
    assert story.rules() == ([rule] if rule else [])
    if rule:
        assert story.alert.message == message
        # Enough for one, and not for two: neither well nor worse.
        story.go_on(600, tokens=7)
        assert story.rules() == [rule]
        story.go_on(65, tokens=10)
        assert story.rules() == []


def test_the_process_with_the_least_tokens_is_told() -> None:
    """Of several, and how many more there are."""
    story = Story()
    story.look(lambda now: worker(now, process(1, tokens=3), process(2, tokens=1), process(3, tokens=2)))
    assert (story.alert.value, story.alert.pid) == (1, None)
    assert "process 2, and 2 more" in story.alert.message


@pytest.mark.parametrize(
    ("picture", "value"),
    [
        (resource(leaks=2), 2),
        (resource(longest_use=30.5), 1),
        (resource(longest_use=29.0), None),
        # Only where a resource says what is too long.
        (resource("api", longest_use=9999.0), None),
    ],
)
def test_a_leak_is_suspected(picture: Any, value: float | None) -> None:
    """Something was left at the end of an attempt, or is held for too long."""
    story = Story()
    story.go_on(5, resource(leaks=0))
    story.go_on(5, picture)
    assert [alert.value for alert in story.state.alerts.values()] == ([] if value is None else [value])


def test_publish_stopped() -> None:
    """A child that the system has stopped, or that stopped half-way, or has no place; idle ones are not accused."""
    story = Story()
    story.go_on(3600, resource(), published=0.0)
    assert story.changes == []
    story.go_on(30, stopped=[1])
    assert story.changes == []
    story.go_on(5, stopped=[1])
    assert story.alert.message == "process 1 is stopped by a signal"
    assert (story.alert.resource, story.alert.pid) == ("", 1)
    story.go_on(65)
    assert story.rules() == []
    story.go_on(35, interrupted=True)
    assert story.alert.message == "process 1 has stopped in the middle of publishing"
    story.go_on(65)
    for _ in range(8):
        story.look(lambda now: worker(now, process(1), unseen=3))
        story.now += STEP
    assert (story.alert.value, story.alert.pid) == (3, None)
    assert story.alert.message == "living children that publish nothing: 3"


def test_children_that_are_just_starting_are_not_accused() -> None:
    """Each of them is unseen for a moment; there may be one at every other look."""
    story = Story()
    for number in range(100):
        story.look(lambda now, number=number: worker(now, process(1), unseen=number % 2))  # type: ignore[misc]
        story.now += STEP
    assert story.changes == []


PICTURES = st.builds(
    resource,
    st.sampled_from(["db", "api"]),
    waits_above=st.integers(0, 5),
    limit=st.sampled_from([0, 1, 10]),
    in_use=st.integers(0, 12),
    open=st.integers(0, 12),
    leaks=st.integers(0, 3),
    longest_use=st.floats(0, 60),
    longest_wait=st.floats(0, 10),
    opened=st.integers(0, 500),
)
PROCESSES = st.builds(
    lambda pid, first, second, tokens, capacity, interrupted: process(
        pid,
        *{each.name: each for each in (first, second)}.values(),
        tokens=tokens,
        capacity=capacity,
        interrupted=interrupted,
    ),
    st.integers(1, 3),
    PICTURES,
    PICTURES,
    st.integers(0, 20),
    st.sampled_from([0, 5, 500]),
    st.booleans(),
)
LOOKS = st.lists(
    st.tuples(
        st.floats(0.1, 40.0), st.lists(PROCESSES, max_size=3, unique_by=lambda each: each.pid), st.integers(0, 2)
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(LOOKS, st.floats(0.0, 60.0), st.floats(0.0, 60.0))
def test_nothing_flaps(looks: list[Any], sustained: float, clear_after: float) -> None:
    """Whatever the snapshots say, counters that start over and children that come and go included: each alert is
    raised and cleared in turns, lasts for `clear_after` at least, and utilisation comes back after `sustained` at the
    soonest."""
    thresholds = Thresholds(sustained=sustained, clear_after=clear_after, window=5.0, leak_after={"db": 30.0})
    story = Story(thresholds)
    for pause, processes, unseen in looks:
        story.now += pause
        picture = worker(story.now, *processes, unseen=unseen)
        story.look(picture, [1] if unseen else [])
    rules = {rule.name: rule for rule in RULES}
    last: dict[tuple[str, str], tuple[float, str]] = {}
    for when, what, rule, about in story.changes:
        before = last.get((rule, about))
        assert rule in rules
        assert (what == "raised") is (before is None or before[1] == "cleared")
        if before is not None and what == "cleared":
            assert when - before[0] >= clear_after
        if before is not None and what == "raised" and rule == "utilisation":
            assert when - before[0] >= sustained or sustained == 0.0
        last[rule, about] = (when, what)
    assert {key for key, (_, what) in last.items() if what == "raised"} == set(story.state.alerts)
    for alert in story.state.alerts.values():
        assert EPOCH <= alert.since <= EPOCH + story.now
        assert alert.message


@settings(max_examples=100, deadline=None)
@given(LOOKS)
def test_what_is_well_for_long_ends_every_alert(looks: list[Any]) -> None:
    """And nothing is remembered of it: the state does not grow."""
    story = Story()
    for pause, processes, unseen in looks:
        story.now += pause
        story.look(worker(story.now, *processes, unseen=unseen))
    calm = [resource("db", limit=10), resource("api", limit=10)]
    story.go_on(1500, *calm)
    assert story.state.alerts == {}
    assert story.state.conditions == {}
    assert max(len(each.samples) for each in story.state.baseline.creation.values()) <= 11 * 60 + 3
