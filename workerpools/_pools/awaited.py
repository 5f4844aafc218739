"""Resources whose value a coroutine opens: on the process's event loop, before the body that uses it begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from workerpools._pools.holder import Holder
from workerpools._pools.resource import Resource
from workerpools._process.event_loop import is_here
from workerpools._run.attempts import Attempt, current
from workerpools.errors import ConfigurationError

__all__ = ["AwaitedResource", "opening"]

T = TypeVar("T")


class AwaitedHolder(Holder[T]):
    """The holder of a value whose opening is awaited."""

    def use(self) -> T:
        """Return the value; raises like :meth:`Resource.get`.

        Raises:
            ConfigurationError: A plain body asks for it, or another thread is opening it.
        """
        if self.overrides:
            return super().use()
        if not is_here():
            attempt = current()
            if attempt is not None and not attempt.awaits:
                raise ConfigurationError(
                    f"{self.where or self.name}: a coroutine opens its value, which lives on the event loop: use it in "
                    "an async body, or in a coroutine that pools.run() runs. This body is a plain function"
                )
            return super().use()
        # The thread that opens it waits for this one.
        if not self._lock.acquire(blocking=False):
            raise ConfigurationError(f"{self!r}: another thread is opening it; {INSTEAD}")
        try:
            return super().use()
        finally:
            self._lock.release()

    def renew_for(self, attempt: Attempt) -> None:
        """Open the value, or another one where that is due, in the attempt's thread; it counts as no use."""
        live = self.live
        if self.overrides or (live is not None and live.version == self._recycles.cells[0]):
            return
        # So that the adapter gets to classify the error.
        attempt.values.setdefault(self, None)
        self._begin(None)
        if attempt.values[self] is None:
            del attempt.values[self]


class AwaitedResource(Resource[T]):
    """A resource whose adapter awaits the opening of its value."""

    _holds = AwaitedHolder
    _holder: AwaitedHolder[T]


#: What opens a value before a body begins.
INSTEAD = "make it an attribute of the task's base, or a parameter with inject(): that opens it before the body begins"


def opening(body: Callable[..., Any], resources: Sequence[AwaitedResource[Any]]) -> Callable[..., Any]:
    """Return an async body before which the values of its resources are opened.

    Args:
        body: The body.
        resources: The resources.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        attempt = current()
        if attempt is not None and not is_here():
            attempt.awaits = True
            for resource in resources:
                resource._holder.renew_for(attempt)
        return body(*args, **kwargs)

    return run
