"""The session of a task body: one per attempt, committed or rolled back with it."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NoReturn, Protocol, overload

import sqlalchemy
from sqlalchemy.orm import Session, SessionTransaction

from workerpools.adapter import Overridable, Resource, current, refusal, scoped
from workerpools.errors import ConfigurationError, NoAttemptError

__all__ = ["TaskSession"]


class BodysSession(Session):
    """A session that an attempt commits or rolls back, and that is of no use once the attempt is over."""

    #: The task's class, and the attribute.
    lent_as: tuple[type, str]

    def finish(self) -> bool:
        """Commit for the attempt. Whatever is done with a session begins its transaction: else there is nothing."""
        if not self.in_transaction():
            return False
        self.commit()
        return True

    def end(self) -> None:
        """Close for the attempt, for good."""
        try:
            self.close()
        finally:
            # Session(close_resets_only=False) would forbid a body to close its session and go on, too.
            self.__class__ = _EndedSession


class _EndedSession(BodysSession):
    """The session of an attempt that is over. A class of its own: the others pay nothing for the question."""

    def begin(self, nested: bool = False) -> SessionTransaction:
        self._refuse()

    def get_bind(self, *arguments: Any, **options: Any) -> Any:
        # Asked for whenever the database is to be used.
        self._refuse()

    def _refuse(self) -> NoReturn:
        self.close()
        raise NoAttemptError(
            f"{self.lent_as[0].__name__}.{self.lent_as[1]}: the run of the task body that this session belonged to "
            "is over, and nobody would commit what it does. Return data from a body, not its session; elsewhere "
            "make a session of your own: sqlalchemy.orm.Session(engine)"
        )


class _GivesEngine(Protocol):
    def __get__(self, instance: Any, owner: type | None = None) -> Any: ...


class TaskSession(Overridable[Session]):
    """Gives a task body its session: one an attempt, made on first use, committed when the body returns.

    It is rolled back and closed on every other way out. As a class attribute it gives a ``sqlalchemy.orm.Session``; one
    that ``override()`` puts in its place stays its maker's: no attempt commits, rolls back or closes it.

    Args:
        engine: The resource whose engine the session uses.
        options: Options of ``sqlalchemy.orm.Session``.

    Raises:
        ConfigurationError: ``engine`` is no resource, or ``Session`` has no such option.
    """

    __workerpools__ = True

    def __init__(self, engine: Resource[sqlalchemy.Engine] | _GivesEngine, **options: Any) -> None:
        super().__init__()
        given: Any = engine
        if callable(given) or not hasattr(type(given), "__get__"):
            name = getattr(given, "__name__", type(given).__name__)
            raise ConfigurationError(
                f"TaskSession({name}): wanted: the resource, so that each process has an engine of its own: "
                "TaskSession(pools.add(SQLAlchemyEngine(url)))"
            )
        known = inspect.signature(Session).parameters
        if unknown := options.keys() - known.keys():
            # It takes autocommit to refuse all but False: nobody should be led there.
            shown = refusal(unknown, known.keys() - {"autocommit"})
            raise ConfigurationError(f"TaskSession: sqlalchemy.orm.Session has no option {shown}")
        self._engine = engine
        self._options = options
        self._name = "session"

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self._where = self._where or f"{owner.__name__}.{name}"

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> TaskSession: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> Session: ...
    def __get__(self, instance: Any, owner: type | None = None) -> TaskSession | Session:
        if instance is None:
            return self
        if self._overrides:
            return self._overrides[-1]
        # Looked at here, too: a body asks for its session over and over.
        attempt = current()
        made: BodysSession | None = None if attempt is None else attempt.scoped.get(self)
        if made is not None:
            return made
        return scoped(
            self,
            partial(self._make, instance, owner),
            f"{type(instance).__name__}.{self._name}",
            "make a session of your own: sqlalchemy.orm.Session(engine)",
        )

    def _make(self, instance: Any, owner: type | None) -> BodysSession:
        engine = self._engine.__get__(instance, owner)
        # A test's stand-in may be a Connection: that has a dialect, too.
        if not hasattr(engine, "dialect"):
            resource = getattr(self._engine, "name", type(self._engine).__name__)
            raise ConfigurationError(
                f"{type(instance).__name__}.{self._name}: the resource {resource!r} gives a {type(engine).__name__}, "
                "not a sqlalchemy.Engine; TaskSession wants the resource of an engine"
            )
        made = BodysSession(engine, **self._options) if self._options else BodysSession(engine)
        made.lent_as = (type(instance), self._name)
        return made

    def _misplaced(self, name: str) -> str:
        return (
            f"{self._where or self._name} is the declaration: a session exists in a task body, as "
            f"self.{self._name}.{name}; elsewhere make one of your own: sqlalchemy.orm.Session(engine)"
        )
