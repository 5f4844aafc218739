"""How long an outage the default retries outlive, and how many come at once: a simulation of the decision itself.

The figures are in docs/failures.md; ``pytest -s`` prints them.
"""

from __future__ import annotations

import collections
import random
import statistics
from collections.abc import Callable, Iterator

import pytest

from tests.support.paths import ROOT
from workerpools import Failure, FailureKind, RetryPolicy
from workerpools._run.delivery import Action, Situation, decide
from workerpools.failures import Sent

TASKS = 5000
OUTAGES = (8, 14, 30, 60, 120, 180, 300)

DOWN = Failure(FailureKind.UNAVAILABLE, Sent.NOTHING)


def tries(policy: RetryPolicy, chance: Callable[[], float]) -> Iterator[float]:
    """Yield when a task is tried again that finds its server down at 0 and ever after, in seconds."""
    at = 0.0
    for retries in range(policy.max_retries + 1):
        decision = decide(DOWN, Situation(policy=policy, retries=retries, chance=chance()))
        if decision.action is not Action.RETRY:
            return
        at += decision.delay
        yield at


@pytest.fixture(scope="module")
def simulated() -> list[list[float]]:
    """The tries of tasks that all found their server down in the same moment."""
    chance = random.Random(20).random
    return [list(tries(RetryPolicy(), chance)) for _ in range(TASKS)]


def survived(simulated: list[list[float]], outage: float) -> float:
    return sum(each[-1] >= outage for each in simulated) / len(simulated)


def test_the_window(simulated: list[list[float]], capsys: pytest.CaptureFixture[str]) -> None:
    """A minute is outlived for certain, a managed database's failover of two by nearly all; the page says the same."""
    shares = {outage: survived(simulated, outage) for outage in OUTAGES}
    lasts = sorted(each[-1] for each in simulated)
    with capsys.disabled():
        print(f"\nlast try after {lasts[0]:.0f} to {lasts[-1]:.0f} s; outlived: {shares}")
    assert 180 <= lasts[0] <= lasts[-1] <= 365
    assert statistics.mean(lasts) == pytest.approx(270, rel=0.02)
    assert all(1 <= each[0] <= 2 for each in simulated)
    assert shares[60] >= 0.99
    assert shares[120] >= 0.99
    page = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    header = "| after an outage of | " + " | ".join(f"{outage} s" for outage in OUTAGES) + " |"
    row = "| tasks that succeed | " + " | ".join(f"{share:.0%}" for share in shares.values()) + " |"
    assert header in page
    assert row in page


def test_no_storm(simulated: list[list[float]], capsys: pytest.CaptureFixture[str]) -> None:
    """However many failed in the same moment, their tries spread: from the second minute on, no second sees more than
    one in twenty of them."""
    seconds = collections.Counter(int(at) for each in simulated for at in each)
    busiest = {start: max(seconds[at] for at in range(start, start + 30)) / TASKS for start in range(0, 360, 30)}
    with capsys.disabled():
        print(f"\ntries per task in the busiest second of each half minute: {busiest}")
    assert max(share for start, share in busiest.items() if start >= 60) <= 0.05
