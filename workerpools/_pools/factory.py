"""Adapters made from functions: how a value is opened and closed, where its library has no adapter."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, cast

from workerpools._pools.adapter import Adapter, Opening
from workerpools._process import event_loop
from workerpools._run import coroutines
from workerpools._run.failure import Failure, FailureKind, Sent
from workerpools.errors import ConfigurationError

__all__ = ["Factory", "FunctionAdapter"]

T = TypeVar("T")


class FunctionAdapter(Adapter[T], Generic[T]):
    """An adapter made from a function that returns the value, or a generator function that yields it once.

    The code after the ``yield`` closes the value; it never runs in a forked child for a value of the parent.

    Args:
        factory: Called without arguments, once per process.
        close: Called with the value to close it; for plain functions. By default the value's own ``close()``, if it
            has one.
        connections: Called with the value at a fork; returns its connections, objects with a ``fileno()``, so that a
            child can discard them. By default the value itself, if it has a ``fileno()``.
    """

    def __init__(
        self,
        factory: Callable[[], Coroutine[Any, Any, T]] | Callable[[], T] | Callable[[], Iterator[T]],
        *,
        close: Callable[[T], object] | None = None,
        connections: Callable[[T], Iterable[Any]] | None = None,
    ) -> None:
        self._factory = factory
        self._close = close
        self._connections = connections
        self._running: dict[int, Iterator[T]] = {}
        self._openings: dict[int, tuple[Opening, float]] = {}

    @property
    def awaited(self) -> bool:
        """Whether a coroutine opens the value."""
        return inspect.iscoroutinefunction(self._factory)

    def open(self, opening: Opening) -> T:
        made: Any = self._awaited_value() if self.awaited else self._factory()
        if inspect.isgenerator(made):
            running = cast("Iterator[T]", made)
            value = next(running)
            self._running[id(value)] = running
            # Collecting a suspended generator runs its clean-up, which must not happen in a child.
            opening.descriptors.keep(running)
        else:
            value = cast("T", made)
        if (connections := self._connections) is not None:
            opening.descriptors.watch(lambda: connections(value))
        elif hasattr(value, "fileno"):
            opening.descriptors.add(cast(Any, value))
        # Counted as one connection: more cannot be observed.
        opening._meter.opened()
        self._openings[id(value)] = (opening, time.monotonic())
        return value

    def close(self, value: T, timeout: float) -> None:
        opening, since = self._openings.pop(id(value), (None, 0.0))
        if opening is not None:
            opening._meter.closed(age=time.monotonic() - since)
        running = self._running.pop(id(value), None)
        if running is not None:
            next(running, None)
            return
        close = self._close or _own_close(value)
        if close is None:
            return
        if self.awaited:
            _on_loop(close, value, timeout)
        else:
            close(value)

    def _awaited_value(self) -> Any:
        opens = cast("Coroutine[Any, Any, Any]", self._factory())
        if not event_loop.is_here():
            return coroutines.run(opens)
        # In the middle of a coroutine nothing can wait; most clients only need to be made on the loop.
        try:
            opens.send(None)
        except StopIteration as done:
            return done.value
        opens.close()
        raise ConfigurationError(
            f"{self.describe()}() waits while it opens its value, and here the event loop would wait for itself; make "
            "the resource an attribute of the task's base, or a parameter with inject(): that opens it before the body "
            "begins"
        )

    def describe(self) -> str:
        return str(getattr(self._factory, "__name__", type(self._factory).__name__))


def _own_close(value: Any) -> Callable[[Any], object] | None:
    own = getattr(value, "close", None)
    return (lambda _: own()) if callable(own) else None


def _on_loop(close: Callable[[Any], object], value: Any, timeout: float) -> None:
    """Close what a coroutine has opened, on the event loop; without the loop it is gone already."""

    async def closing() -> None:
        left = close(value)
        if inspect.isawaitable(left):
            await left

    async def in_time() -> None:
        import asyncio

        await asyncio.wait_for(closing(), max(timeout, 0.25))

    if event_loop.is_here():
        event_loop.start(closing())
    elif event_loop.is_running():
        coroutines.run(in_time())


class Factory(FunctionAdapter[T], Generic[T]):
    """An adapter made from functions: how a value is opened, closed and discarded, and what its errors prove.

    >>> import socket
    >>> from workerpools import FailureKind, WorkerPools
    >>> from workerpools.adapter import Factory
    >>> def classify(error):
    ...     return FailureKind.UNAVAILABLE if isinstance(error, ConnectionRefusedError) else None
    >>> with socket.create_server(("127.0.0.1", 0)) as server, WorkerPools() as pools:
    ...     address = server.getsockname()
    ...     line = pools.add(Factory(lambda: socket.create_connection(address, 3.0), classify=classify), name="line")
    ...     line.get().getpeername() == address
    True

    Args:
        open: Called without arguments, once per process: returns the value. Or a generator function that yields it once
            and closes it after the ``yield``. Or a coroutine function: it runs on the process's event loop, where the
            value is closed, too; only async bodies and ``pools.run()`` may use it.
        close: Called with the value to close it; for plain functions, and for coroutine functions, where it may be one
            itself. By default the value's own ``close()``, if it has one.
        discard: Called with an inherited value in a forked child, to drop what it holds without a byte to its peers:
            see :meth:`Adapter.discard`.
        classify: Called with an error that ended an attempt, and with its causes: returns a :class:`FailureKind`, a
            :class:`Failure`, or None for an error that is none of this value's connections. After ``STALE``,
            ``INDETERMINATE`` and ``UNAVAILABLE`` the next attempt gets a new value.
        connections: Called with the value at a fork; returns its connections, objects with a ``fileno()``, so that a
            child can discard them. By default the value itself, if it has a ``fileno()``.
        effects: Whether a use may do what must not be done twice. Nothing sees what a value does, so every attempt that
            uses it has an effect, and is run again only if its task is idempotent. False for a value that only reads,
            and where bodies declare their effects themselves: ``self.effect("sent the mail")``.

    Raises:
        ConfigurationError: An argument is not a function, ``effects`` is not a bool, or ``close`` was given with a
            generator function.
    """

    def __init__(
        self,
        open: Callable[[], Coroutine[Any, Any, T]] | Callable[[], T] | Callable[[], Iterator[T]],
        *,
        close: Callable[[T], object] | None = None,
        discard: Callable[[T], object] | None = None,
        classify: Callable[[BaseException], FailureKind | Failure | None] | None = None,
        connections: Callable[[T], Iterable[Any]] | None = None,
        effects: bool = True,
    ) -> None:
        functions = {"close": close, "discard": discard, "classify": classify, "connections": connections}
        for name, given in {"open": open, **{name: given for name, given in functions.items() if given}}.items():
            if not callable(given):
                raise ConfigurationError(f"Factory: {name}={given!r}; wanted: a function")
        if close is not None and inspect.isgeneratorfunction(open):
            raise ConfigurationError(
                "Factory: close= is for functions that return the value; a generator function closes it after the yield"
            )
        if inspect.isasyncgenfunction(open):
            raise ConfigurationError(
                "Factory: open= is an asynchronous generator function; give a coroutine function that returns the "
                "value, and close="
            )
        if inspect.iscoroutinefunction(close) and not inspect.iscoroutinefunction(open):
            raise ConfigurationError("Factory: close= is a coroutine function; make open= one, too")
        if not isinstance(cast(Any, effects), bool):
            raise ConfigurationError(f"Factory: effects={effects!r}; wanted: True or False")
        super().__init__(open, close=close, connections=connections)
        self._discard = discard
        self._classify = classify
        self.unseen_effects = effects

    def discard(self, value: T) -> None:
        if self._discard is not None:
            self._discard(value)

    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Failure | None:
        found = None if self._classify is None else self._classify(error)
        if isinstance(found, FailureKind):
            found = Failure(found, Sent.UNKNOWN, known=f"its classify= takes {type(error).__name__} for {found.value}")
        if found is not None and found.kind in _BROKEN:
            for opening, _ in list(self._openings.values()):
                opening.broken()
        return found


#: The failures after which a connection is not to be used again.
_BROKEN = (FailureKind.STALE, FailureKind.INDETERMINATE, FailureKind.UNAVAILABLE)
