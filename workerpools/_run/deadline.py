"""When a task must have ended, and how long everything it waits for may take."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from workerpools._values import WEEK, seconds

__all__ = ["NO_DEADLINE", "Deadline", "seconds_allowed"]


@dataclass(eq=False, repr=False, slots=True)
class Deadline:
    """When a task must have ended.

    Attributes:
        at: On the clock of :func:`time.monotonic`; None without any limit.
    """

    at: float | None = None

    def remaining(self) -> float | None:
        """Return the seconds that are left, never below 0; None without a limit."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())

    def clamp(self, timeout: float | None, least: float = 0.0) -> float | None:
        """Return ``timeout``, or what is left where that is less; None waits for ever. In seconds.

        Args:
            timeout: In seconds; None without one.
            least: Returned where less is left: a socket with a timeout of 0 does not wait, and raises no timeout.

        Raises:
            ConfigurationError: ``timeout`` is no number, negative, or longer than a week.
        """
        if timeout is not None:
            timeout = seconds(timeout, "Deadline.clamp(): timeout", most=WEEK, optional=True)
        remaining = self.remaining()
        if remaining is None:
            return timeout
        remaining = max(least, remaining)
        return remaining if timeout is None else min(timeout, remaining)

    def nearest(self, other: Deadline) -> Deadline:
        """Return the one of the two that comes first."""
        if self.at is None or (other.at is not None and other.at < self.at):
            return other
        return self

    def __repr__(self) -> str:
        remaining = self.remaining()
        return "Deadline(none)" if remaining is None else f"Deadline(in {remaining:.3f} s)"


NO_DEADLINE = Deadline()


def seconds_allowed(limits: Iterable[float | None], margin: float) -> float | None:
    """Return how long a task may take, in seconds: the least of its limits, minus a margin.

    The margin is what is left for the error to come back before Celery's own limit strikes. Of a short limit it takes
    half at most.

    Args:
        limits: In seconds; None or 0 where there is none.
        margin: In seconds.
    """
    # A list: a generator would be resumed for each limit, in every task that has one.
    least = min([limit for limit in limits if limit], default=None)
    return None if least is None else max(least - margin, least / 2)
