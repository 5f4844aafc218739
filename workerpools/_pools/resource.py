"""Resources: what users declare, and the handle through which they reach each process's value."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, cast, overload

from workerpools._pools.adapter import Adapter
from workerpools._pools.holder import Holder
from workerpools._pools.injection import Injected
from workerpools._pools.shared import ExecutionPool, Shared
from workerpools._stats.meter import Meter
from workerpools._values import WEEK, check_name, seconds
from workerpools.errors import ConfigurationError

__all__ = ["Overridable", "Resource"]

T = TypeVar("T")

logger = logging.getLogger("workerpools")


class Overridable(Generic[T]):
    """A value that tests can override."""

    def __init__(self) -> None:
        self._overrides: tuple[T, ...] = ()
        #: Its class attribute, for messages.
        self._where = ""

    @contextmanager
    def override(self, value: T) -> Generator[T, None, None]:
        """Replace the resource's value in all threads of this process until the end of the block.

        The replacement is never closed. Blocks may be nested; the innermost one applies.

        Args:
            value: The replacement.
        """
        self._overrides = (*self._overrides, value)
        depth = len(self._overrides)
        try:
            yield value
        finally:
            self._overrides = (*self._overrides[: depth - 1], *self._overrides[depth:])

    def inject(self) -> T:
        """Return the default of a parameter that each run of a task's body gets the value for, as ``self.…`` would.

        >>> from celery import Celery
        >>> from workerpools import PooledTask, WorkerPools
        >>> app = Celery("shop", set_as_current=False)
        >>> prices = WorkerPools(app).add(lambda: {"teapot": 12}, name="prices")
        >>> @app.task(base=PooledTask, name="shop.price")
        ... def price(sku, prices=prices.inject()):
        ...     return prices[sku]
        >>> price("teapot")
        12
        >>> price("teapot", {"teapot": 10})
        10

        Returns:
            A placeholder. Its type is that of the value for type checkers, so that the parameter has the value's type.
        """
        return cast(T, Injected(self))

    if not TYPE_CHECKING:  # a type checker would believe every name

        def __getattr__(self, name: str) -> Any:
            if hasattr(type(self), name):
                # A property of this class raised an AttributeError: let it propagate unchanged.
                return object.__getattribute__(self, name)
            if refusal := self._refusal(name):
                raise ConfigurationError(refusal)
            hint = "" if name.startswith("_") else f"; {self._misplaced(name)}"
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}", name=name, obj=self)

    def _refusal(self, name: str) -> str:
        """Return why nothing must ask for an attribute of this name; empty for a plain AttributeError."""
        return ""

    def _place(self) -> tuple[str, str]:
        """Return the handle as text, and its attribute's name."""
        # Also called on half-initialized objects, by copy for one.
        attribute = self.__dict__.get("_name") or "resource"
        return self.__dict__.get("_where") or attribute, attribute

    def _misplaced(self, name: str) -> str:
        """Return a hint for the access of a value's attribute on the handle."""
        where, attribute = self._place()
        return f"{where} is the handle, not the value: write {where}.get().{name}, or self.{attribute}.{name} in a body"


class Resource(Overridable[T]):
    """A declared connection holder, and this process's value of it.

    As a class attribute of a task base it returns the value (``self.api``); on the class itself, or in a variable, it
    is a handle. Created by :meth:`workerpools.WorkerPools.add`.

    >>> from workerpools import WorkerPools
    >>> pools = WorkerPools()
    >>> prices = pools.add(lambda: {"teapot": 12}, name="prices")
    >>> prices
    <Resource 'prices' FunctionAdapter closed pid=...>
    >>> prices.get()
    {'teapot': 12}
    >>> with prices.override({"teapot": 10}):
    ...     prices.get()
    {'teapot': 10}
    >>> prices.close()
    """

    #: The WorkerPools that declares it.
    pools: Any = None

    #: What holds its value; a subclass has one of its own.
    _holds: type[Holder[Any]] = Holder

    def __init__(self, shared: Shared, adapter: Adapter[T], name: str | None) -> None:
        on_open = getattr(adapter, "on_open", None)
        if on_open is not None and not callable(on_open):
            raise ConfigurationError(
                f"{type(adapter).__name__}: on_open is {on_open!r}, not a function of one argument; to call several, "
                "call them in one function"
            )
        self.shared = shared
        self.adapter = adapter
        self._holder: Holder[T] = self._holds(shared, adapter, name)
        super().__init__()

    @property
    def _overrides(self) -> tuple[T, ...]:
        return self._holder.overrides

    @_overrides.setter
    def _overrides(self, values: tuple[T, ...]) -> None:
        self._holder.overrides = values

    def _place(self) -> tuple[str, str]:
        # Also called on half-initialized objects, by copy for one.
        holder: Holder[T] | None = self.__dict__.get("_holder")
        attribute = (None if holder is None else holder.given) or "resource"
        return self.__dict__.get("_where") or attribute, attribute

    def _refusal(self, name: str) -> str:
        adapter = self.__dict__.get("adapter")
        if name not in getattr(adapter, "event_attributes", ()):
            return ""
        where, _ = self._place()
        return (
            f"{where} is the handle, not the value, and each process opens a value of its own: attach listeners in "
            f"{type(adapter).__name__}(on_open=…), which is called with every value opened"
        )

    @property
    def name(self) -> str:
        """The resource's name: the declared one, or that of its class attribute."""
        return self._holder.name

    def __set_name__(self, owner: type, name: str) -> None:
        if self._holder.given is None:
            # Errors have to wait for __init_subclass__: before Python 3.12 they become a RuntimeError here.
            self._holder.given = name
            # The first owner of a name keeps it.
            self.shared.names.setdefault(name, self)
        self._where = self._holder.where = self._where or f"{owner.__name__}.{name}"

    def check_name(self, where: str) -> None:
        """Raise an error if its name is invalid or already in use.

        Args:
            where: The attribute, for the message.

        Raises:
            ConfigurationError: The name is invalid, or another resource has it.
        """
        try:
            check_name(self.name, where)
        except ConfigurationError:
            self.shared.resources.remove(self)
            self.shared.names.pop(self.name, None)
            raise
        other = self.shared.names.get(self.name)
        if other is not None and other is not self:
            self.shared.resources.remove(self)
            raise ConfigurationError(
                f"{where}: another resource of the same WorkerPools is named {self.name!r} ({other!r}); "
                "use that one here, or name this one: pools.add(…, name='…')"
            )

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Resource[T]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Resource[T] | T:
        return self if instance is None else self._holder.use()

    def get(self, *arguments: NoReturn, **options: NoReturn) -> T:
        """Return this process's value; the first call in a process opens it.

        Raises:
            TypeError: An argument was passed, probably meant for a method of the value.
            OpenTimeoutError: Another thread has been opening the value for 60 seconds.
            ConfigurationError: The value's factory uses the resource itself.
            Exception: The client library's error while opening, with a note that names the resource.
        """
        if arguments or options:
            raise TypeError(f"{type(self).__name__}.get() takes no arguments; {self._misplaced('get(…)')}")
        return self._holder.use()

    def close(self, timeout: float | None = None) -> None:
        """Close this process's value, if it has one; the next use opens another.

        Args:
            timeout: The longest wait for work in flight, in seconds; the setting ``workerpools_close_timeout`` if None.

        Raises:
            ConfigurationError: ``timeout`` is not a number, is negative, or is longer than a week.
            Exception: The adapter's error while closing.
        """
        if timeout is not None:
            seconds(timeout, "Resource.close(): timeout", most=WEEK, optional=True)
        self._holder.close(timeout)

    def recycle(self) -> None:
        """Replace its connections (see :meth:`workerpools.WorkerPools.recycle`)."""
        self.shared.collector.recycle([self.name])

    @property
    def where(self) -> str:
        """The class attribute that declares it, or its name."""
        return self._where or self.name

    def capacity(self, execution_pool: ExecutionPool) -> int | None:
        """Return the most connections that one process has open at a time; see :meth:`Adapter.capacity`.

        Args:
            execution_pool: The execution pool of the process.
        """
        try:
            return self.adapter.capacity(execution_pool)
        except Exception:
            # Asked for with every snapshot; what is wrong with the declaration is said when it is used.
            logger.debug("the capacity of %r is unknown", self, exc_info=True)
            return None

    @property
    def kind(self) -> str:
        """Its adapter's kind, such as ``http``; empty if unknown."""
        return self._holder.kind

    @property
    def meter(self) -> Meter:
        """Its statistics in this process."""
        return self._holder.meter

    @property
    def leak_after(self) -> float | None:
        """The time after which a connection in use is reported with its stack, in seconds; None for never."""
        return self._holder.leak_after

    @property
    def is_open(self) -> bool:
        """Whether this process has an open value of its own."""
        return self._holder.is_open

    def __repr__(self) -> str:
        return repr(self._holder)
