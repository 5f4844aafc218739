"""A value of a resource, and what becomes of one whose place another has taken while it was still in use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Generic, TypeVar

from workerpools._process.descriptors import Descriptors
from workerpools._run import attempts

if TYPE_CHECKING:
    from workerpools._run.attempts import Attempt

__all__ = ["Live", "Turnover"]

T = TypeVar("T")


class Live(Generic[T]):
    """A value that is open.

    Attributes:
        value: The value.
        descriptors: Its connections.
        born: When opening it began, or when its connections were replaced last, on the clock of
            :func:`time.monotonic`.
        looked: The version of the requests to recycle that it is known to be up to date with.
        lent: Whether it was given out outside of an attempt, so that nothing tells when it is not used any more.
    """

    __slots__ = ("born", "descriptors", "lent", "looked", "value")

    def __init__(self, value: T, descriptors: Descriptors, born: float) -> None:
        self.value = value
        self.descriptors = descriptors
        self.born = born
        self.looked = -1.0
        self.lent = False


class Turnover(Generic[T]):
    """The values of a resource that are used to their end, by those who began with them, and by nobody else.

    Its owner calls it under a lock.
    """

    def __init__(self) -> None:
        #: The attempts that have begun with a value that was replaced since.
        self.bound: dict[Attempt, Live[T]] = {}
        #: Those values; and others that may be in use outside of every attempt, until all is closed.
        self.superseded: list[Live[T]] = []

    def of(self, attempt: Attempt | None) -> Live[T] | None:
        """Return the value that ``attempt`` has begun with, or one that it runs inside of; None for the present one."""
        if self.bound:
            for each in attempts.line(attempt):
                if each in self.bound:
                    return self.bound[each]
        return None

    def supersede(self, live: Live[T], users: Iterable[Attempt]) -> bool:
        """Note that ``live`` is given to nobody else; return whether it can be closed now.

        Args:
            live: The value. It is not the resource's present one any more.
            users: The attempts that have used the resource, as far as they run.
        """
        self.superseded.append(live)
        begun = [attempt for attempt in users if attempt not in self.bound]
        self.bound.update(dict.fromkeys(begun, live))
        # One that ended meanwhile may have looked too early to find itself here.
        running = attempts.running()
        for attempt in begun:
            if attempt not in running:
                self.bound.pop(attempt, None)
        return self._is_free(live)

    def release(self, attempt: Attempt) -> Live[T] | None:
        """Note that ``attempt`` has ended; return the value that can be closed with it."""
        live = self.bound.pop(attempt, None)
        return live if live is not None and self._is_free(live) else None

    def _is_free(self, live: Live[T]) -> bool:
        return not live.lent and live not in self.bound.values()

    def ended(self, live: Live[T]) -> None:
        """Forget a value that was closed."""
        if live in self.superseded:
            self.superseded.remove(live)
