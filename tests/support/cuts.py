"""When the proxy ends a connection: after so many bytes, or at a chunk that a predicate recognises."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from tests.support.sockets import Ending

Direction = Literal["to_server", "to_client"]
Scope = Literal["next", "open", "all"]


class Cut:
    """One rule of the proxy, as the test sees it.

    Attributes:
        direction: Whose bytes the rule looks at.
        how: How both sides of the connection are ended.
        reply_wait: Seconds to wait between forwarding and ending for the reply, which is swallowed.
    """

    def __init__(
        self,
        direction: Direction,
        how: Ending,
        *,
        after: int | None = None,
        predicate: Callable[[bytes], bool] | None = None,
        deliver: bool = False,
        reply_wait: float = 0.0,
        times: int | None = None,
    ) -> None:
        self.direction: Direction = direction
        self.how: Ending = how
        self.reply_wait = reply_wait
        self._fired = 0
        self._after = after
        self._predicate = predicate
        self._deliver = deliver
        self._left = times
        self._changed = threading.Condition()

    @property
    def fired(self) -> int:
        """How many connections this rule has ended; whoever saw one end finds it counted."""
        with self._changed:
            return self._fired

    def cancel(self) -> None:
        """End no further connection."""
        self._left = 0

    def wait(self, timeout: float = 5.0, *, fired: int = 1) -> None:
        """Wait until the rule has ended `fired` connections; else `TimeoutError`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._fired >= fired, timeout):
                raise TimeoutError(f"the cut fired {self._fired} times in {timeout} s, {fired} expected")

    def arm(self) -> ArmedCut:
        """Return this rule with a byte count of its own, for one connection."""
        return ArmedCut(self, self._after)

    def judge(self, data: bytes, left: int | None) -> bytes | None:
        """Return the part of `data` to forward before ending the connection, or None to let it all pass."""
        if self._left == 0:
            return None
        if left is not None:
            return data[:left] if len(data) >= left else None
        if self._predicate is not None and self._predicate(data):
            return data if self._deliver else b""
        return None

    def take(self) -> None:
        """Use up one of the rule's times; called by the proxy when a connection is condemned."""
        if self._left is not None:
            self._left -= 1

    @contextmanager
    def firing(self) -> Iterator[None]:
        """Count a connection whose sockets the proxy closes inside."""
        with self._changed:
            yield
            self._fired += 1
            self._changed.notify_all()


class ArmedCut:
    """A rule at work on one connection."""

    def __init__(self, rule: Cut, left: int | None) -> None:
        self.rule = rule
        self._left = left

    def feed(self, data: bytes) -> bytes | None:
        """Look at a chunk; the answer is that of `Cut.judge`."""
        keep = self.rule.judge(data, self._left)
        if keep is None and self._left is not None:
            self._left -= len(data)
        return keep
