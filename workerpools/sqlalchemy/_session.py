"""The session of a task body: one per attempt, committed or rolled back with it."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NoReturn, Protocol, overload

import sqlalchemy
from sqlalchemy.orm import Session, SessionTransaction

from workerpools.adapter import Overridable, Resource, current, refusal, scoped
from workerpools.errors import ConfigurationError, NoAttemptError

__all__ = ["EVENT_ATTRIBUTES", "TaskSession"]

#: ``event.listen()`` recognizes its targets by their type, else by one of these (``sqlalchemy/event/base.py`` and the
#: ``_accept_with`` of each kind of event).
EVENT_ATTRIBUTES = ("dispatch", "_no_async_engine_events")


class BodysSession(Session):
    """A session that its attempt commits or rolls back, unusable once the attempt has ended."""

    #: The task's class and the attribute's name.
    owner: tuple[type, str]

    def finish(self) -> bool:
        """Commit for the attempt; return whether there was anything to commit. Any use of a session begins one."""
        if not self.in_transaction():
            return False
        self.commit()
        return True

    def end(self) -> None:
        """Close for the attempt, for good."""
        try:
            self.close()
        finally:
            # Session(close_resets_only=False) would also keep a body from closing its session and going on.
            self.__class__ = _EndedSession  # pyright: ignore[reportAttributeAccessIssue]


class _EndedSession(BodysSession):
    """The session of an ended attempt. A separate class, so that live sessions need no check."""

    def begin(self, nested: bool = False) -> SessionTransaction:
        self._refuse()

    def get_bind(self, *arguments: Any, **options: Any) -> Any:
        # Called before every use of the database.
        self._refuse()

    def _refuse(self) -> NoReturn:
        self.close()
        raise NoAttemptError(
            f"{self.owner[0].__name__}.{self.owner[1]}: the run of the task body that this session belonged to has "
            "ended, and its changes would never be committed. Return data from a body, not its session; elsewhere "
            "create your own: sqlalchemy.orm.Session(engine)"
        )


class _GivesEngine(Protocol):
    def __get__(self, instance: Any, owner: type | None = None) -> Any: ...


class TaskSession(Overridable[Session]):
    """A task body's session: one per attempt, created on first use and committed when the body returns.

    Otherwise it is rolled back and closed. As a class attribute it returns a ``sqlalchemy.orm.Session``. A session that
    ``override()`` puts in its place belongs to the caller: no attempt commits, rolls back or closes it.

    Args:
        engine: The resource whose engine the session uses.
        options: Options of ``sqlalchemy.orm.Session``.

    Raises:
        ConfigurationError: ``engine`` is not a resource, or ``Session`` has no such option.
    """

    __workerpools__ = True

    def __init__(self, engine: Resource[sqlalchemy.Engine] | _GivesEngine, **options: Any) -> None:
        super().__init__()
        given: Any = engine
        if callable(given) or not hasattr(type(given), "__get__"):
            name = getattr(given, "__name__", type(given).__name__)
            raise ConfigurationError(
                f"TaskSession({name}): wanted: the resource, so that each process has its own engine: "
                "TaskSession(pools.add(SQLAlchemyEngine(url)))"
            )
        known = inspect.signature(Session).parameters
        if unknown := options.keys() - known.keys():
            # Session accepts autocommit only to reject all but False; do not suggest it.
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
        # A shortcut: bodies use their session often.
        attempt = current()
        made: BodysSession | None = None if attempt is None else attempt.scoped.get(self)
        if made is not None:
            return made
        return scoped(
            self,
            partial(self._make, instance, owner),
            f"{type(instance).__name__}.{self._name}",
            "create your own session: sqlalchemy.orm.Session(engine)",
        )

    def _make(self, instance: Any, owner: type | None) -> BodysSession:
        engine = self._engine.__get__(instance, owner)
        # A test may substitute a Connection, which has a dialect too.
        if not hasattr(engine, "dialect"):
            resource = getattr(self._engine, "name", type(self._engine).__name__)
            raise ConfigurationError(
                f"{type(instance).__name__}.{self._name}: the resource {resource!r} is a {type(engine).__name__}, "
                "not a sqlalchemy.Engine; TaskSession needs the resource of an engine"
            )
        made = BodysSession(engine, **self._options) if self._options else BodysSession(engine)
        made.owner = (type(instance), self._name)
        return made

    def _refusal(self, name: str) -> str:
        if name not in EVENT_ATTRIBUTES:
            return ""
        where, attribute = self._place()
        return (
            f"{where} is the declaration, and each run has a session of its own: listen to sqlalchemy.orm.Session, or "
            f"to self.{attribute} in a task body"
        )

    def _misplaced(self, name: str) -> str:
        return (
            f"{self._where or self._name} is the declaration: the session exists in a task body, as "
            f"self.{self._name}.{name}; elsewhere create your own: sqlalchemy.orm.Session(engine)"
        )
