"""The one question to all workers: when it is asked again, and when not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from workerpools.flower._page import _stats

TIMEOUT = 0.2


class Broker:
    """What Celery's app is to the question: answers, one after the other, and how long each takes."""

    def __init__(self, *answers: tuple[dict[str, Any] | None, float]) -> None:
        self.control = self
        self.answers = list(answers)
        self.limits: list[int | None] = []

    @contextmanager
    def connection_or_acquire(self) -> Iterator[Broker]:
        yield self

    def ensure_connection(self, max_retries: int, timeout: float) -> None:
        assert (max_retries, timeout) == (1, TIMEOUT)

    def inspect(self, *, timeout: float, connection: Broker, limit: int | None = None) -> Broker:
        assert (timeout, connection) == (TIMEOUT, self)
        self.limits.append(limit)
        return self

    def stats(self) -> dict[str, Any] | None:
        answer, seconds = self.answers.pop(0)
        time.sleep(seconds)
        return answer


@pytest.mark.parametrize(
    ("answers", "expected", "told", "limits"),
    [
        # Nobody is known: who answers in time is found.
        ([({"a": 1}, TIMEOUT)], 0, {"a": 1}, [None]),
        # Everybody has answered: nothing more is waited for.
        ([({"a": 1, "b": 2}, 0.0)], 2, {"a": 1, "b": 2}, [2]),
        ([({"a": 1, "b": 2}, 0.0)], 1, {"a": 1, "b": 2}, [1]),
        # Not in time: who is missing does not answer.
        ([({"a": 1}, TIMEOUT)], 2, {"a": 1}, [2]),
        ([(None, TIMEOUT)], 1, {}, [1]),
        # In time, but fewer: late answers to an earlier question were counted in their place.
        ([({"a": 1}, 0.0), ({"a": 3, "b": 2}, 0.0)], 2, {"a": 3, "b": 2}, [2, None]),
        ([(None, 0.0), (None, 0.0)], 1, {}, [1, None]),
    ],
)
def test_asked_again(
    answers: list[tuple[dict[str, Any] | None, float]], expected: int, told: dict[str, Any], limits: list[int | None]
) -> None:
    """Once if everybody answers or the time is up, and once more where the limit was reached by late answers."""
    broker = Broker(*answers)
    assert _stats(broker, TIMEOUT, expected=expected) == told
    assert broker.limits == limits
