"""Task deadlines, and the bounds they put on waits."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from workerpools._values import WEEK, seconds

__all__ = ["NO_DEADLINE", "Deadline", "seconds_allowed"]


@dataclass(eq=False, repr=False, slots=True)
class Deadline:
    """The time by which a task must have ended.

    Attributes:
        at: On the clock of :func:`time.monotonic`; None for no limit.
    """

    at: float | None = None

    def remaining(self) -> float | None:
        """Return the time left, in seconds, never below 0; None without a limit."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())

    def clamp(self, timeout: float | None, least: float = 0.0) -> float | None:
        """Return the smaller of ``timeout`` and the time left, in seconds; None without either limit.

        Args:
            timeout: In seconds; None for no timeout.
            least: The lower bound of the time left, in seconds: a socket timeout of 0 means non-blocking.

        Raises:
            ConfigurationError: ``timeout`` is not a number, is negative, or is longer than a week.
        """
        if timeout is not None:
            timeout = seconds(timeout, "Deadline.clamp(): timeout", most=WEEK, optional=True)
        remaining = self.remaining()
        if remaining is None:
            return timeout
        remaining = max(least, remaining)
        return remaining if timeout is None else min(timeout, remaining)

    def nearest(self, other: Deadline) -> Deadline:
        """Return the earlier of the two deadlines."""
        if self.at is None or (other.at is not None and other.at < self.at):
            return other
        return self

    def __repr__(self) -> str:
        remaining = self.remaining()
        return "Deadline(none)" if remaining is None else f"Deadline(in {remaining:.3f} s)"


NO_DEADLINE = Deadline()


def seconds_allowed(limits: Iterable[float | None], margin: float) -> float | None:
    """Return the time a task may take, in seconds: its shortest limit, minus a margin.

    The margin lets an error propagate before Celery's own limit strikes. It is at most half of the limit.

    Args:
        limits: In seconds; None or 0 for no limit.
        margin: In seconds.

    Returns:
        The time in seconds; None without a limit.
    """
    # A list: faster than a generator, and this runs for every task with a limit.
    least = min([limit for limit in limits if limit], default=None)
    return None if least is None else max(least - margin, least / 2)
