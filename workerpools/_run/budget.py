"""A token bucket that prevents a storm of replays during an outage."""

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
    """This process's tokens for replays. Replays take tokens, and successes return them.

    Args:
        capacity: The maximum and initial number of tokens; 0 turns replays off.
    """

    #: Whether a token was ever taken in this process: until then successes have nothing to return.
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
        """The number of tokens left."""
        self._own()
        return self._tokens

    def take(self, *, timed_out: bool) -> bool:
        """Take the tokens for one replay; return whether there were enough.

        Args:
            timed_out: Whether the failure was a timeout: it costs more tokens, because it has already cost time.
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
        """Return tokens after a success.

        Args:
            replays: The number of replays before the success, whose tokens are returned; 0 returns one token.
        """
        if self._full:
            return
        self._own()
        with self._lock:
            self._tokens = min(self.capacity, self._tokens + max(1, replays * REPLAY_COST))
            self._full = self._tokens == self.capacity
            self._told()

    def tell(self, tell: Callable[[int, int], object]) -> None:
        """Report every change of the tokens in this process.

        Args:
            tell: Called with the tokens and the capacity. Must not block.
        """
        self._own()
        self._tell = tell

    def _told(self) -> None:
        if self._tell is not None:
            self._tell(self._tokens, self.capacity)

    def _own(self) -> None:
        # A forked child has its own budget, and a thread of the parent may have held the inherited lock.
        if self._pid != os.getpid():
            self._fill()
