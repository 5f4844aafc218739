"""A token bucket that keeps an outage from being answered with a storm of replays."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

__all__ = ["Budget"]

#: As in botocore's standard retry mode (documentation of the AWS SDKs, "Retry behavior").
CAPACITY = 500
REPLAY_COST = 5
TIMEOUT_COST = 10


class Budget:
    """The tokens that this process has for replays. A replay takes some; every success gives back.

    Args:
        capacity: How many there are at most, and at the start; 0 means that nothing is replayed.
    """

    #: Whether a token was ever taken in this process: until then a success has nothing to give back.
    touched = False

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._tell: Callable[[int, int], object] | None = None
        self._fill()

    def _fill(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._tokens = self.capacity
        self._full = True
        self._tell = None

    @property
    def tokens(self) -> int:
        """How many are left."""
        self._own()
        return self._tokens

    def take(self, *, timed_out: bool) -> bool:
        """Take the tokens for one replay; return whether there were enough.

        Args:
            timed_out: Whether a time-out is what failed: it costs more, as it already cost time.
        """
        self._own()
        cost = TIMEOUT_COST if timed_out else REPLAY_COST
        with self._lock:
            if self._tokens < cost:
                return False
            self._tokens -= cost
            self._full = False
            Budget.touched = True
            self._told()
            return True

    def succeeded(self, replays: int) -> None:
        """Give tokens back: what the replays took that led to a success, or one for a success without any."""
        if self._full:
            return
        self._own()
        with self._lock:
            self._tokens = min(self.capacity, self._tokens + max(1, replays * REPLAY_COST))
            self._full = self._tokens == self.capacity
            self._told()

    def tell(self, tell: Callable[[int, int], object]) -> None:
        """Call ``tell`` with the tokens and the capacity whenever they change in this process; it must not block."""
        self._own()
        self._tell = tell

    def _told(self) -> None:
        if self._tell is not None:
            self._tell(self._tokens, self.capacity)

    def _own(self) -> None:
        # A forked child has a budget of its own, and must not wait for a lock that a thread of its parent held.
        if self._pid != os.getpid():
            self._fill()
