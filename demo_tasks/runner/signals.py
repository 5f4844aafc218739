"""Ctrl-C and its relatives: the first one asks for an orderly end, the second one for a quick end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType

__all__ = ["Interrupted", "Stop"]


class Interrupted(BaseException):
    """The user, or the system, wants the demo to end.

    Args:
        number: The signal that said so.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stop:
    """A context manager that handles SIGINT, SIGTERM and SIGHUP.

    The first signal raises :class:`Interrupted` where the program is at that moment, unless it is tidying up already.
    Every later one, and every one while tidying up, calls ``hurry``.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        #: Called in the signal handler when the end is to come quickly; must not raise.
        self.hurry: Callable[[], object] = lambda: None
        self._tidying = False
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # What nohup ignores stays ignored; that a shell's background job ignores Ctrl-C would leave no way out.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)

    def tidy_up(self) -> None:
        """Raise no more: from here on everything is being stopped in order."""
        self._tidying = True

    def check(self) -> None:
        """Raise if a signal came whose exception was lost, in a finalizer for one.

        Raises:
            Interrupted: See above.
        """
        if self.received is not None and not self._tidying:
            raise Interrupted(self.received)

    def _received(self, number: int, frame: FrameType | None) -> None:
        first = self.received is None
        self.received = number if first else self.received
        if first and not self._tidying:
            raise Interrupted(number)
        self.hurry()
