"""The session of a task body: one per attempt, committed or rolled back with it."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, overload

import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Mapper, Session, SessionTransaction, scoped_session, sessionmaker

from workerpools.adapter import Attempt, Overridable, Resource, Scoped, current, refusal, require
from workerpools.errors import ConfigurationError, NoAttemptError

if TYPE_CHECKING:
    # A dependency of SQLAlchemy. With the default, an annotation ``TaskSession`` needs no argument.
    from typing_extensions import Self, TypeVar

    S = TypeVar("S", bound=Session, default=Session)
    T = TypeVar("T")
else:
    from typing import TypeVar

    S = TypeVar("S")
    T = TypeVar("T")

__all__ = ["EVENT_ATTRIBUTES", "GivesEngine", "InAttempt", "Sessions", "TaskSession", "current_session"]

#: ``event.listen()`` recognizes its targets by their type, else by one of these (``sqlalchemy/event/base.py`` and the
#: ``_accept_with`` of each kind of event).
EVENT_ATTRIBUTES = ("dispatch", "_no_async_engine_events")

logger = logging.getLogger("workerpools")


_ELSEWHERE = "create your own session: {}.new()"


class GivesEngine(Protocol):
    """A resource that is made from an app's settings."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any: ...
    def get(self) -> Any: ...


class InAttempt(Scoped, Generic[T]):
    """A session in its attempt, which commits it or rolls it back.

    Attributes:
        session: The session.
        sync: The session; of an asynchronous one, the synchronous one in it.
        does: Commits, rolls back, closes and invalidates it, and waits for that: the session itself, if synchronous.
        declared: Its declaration.
        owner: The class of its task.
    """

    session: T
    sync: Session
    does: Any
    declared: Sessions[Any]
    owner: type

    def finish(self) -> bool:
        # Any use of a session begins a transaction.
        if not self.sync.in_transaction():
            return False
        if not self.declared._commits:
            self._tell()
            return False
        self.does.commit()
        return True

    def rollback(self) -> None:
        self.does.rollback()

    def invalidate(self) -> None:
        self.does.invalidate()

    def end(self) -> None:
        """Close the session for good."""
        session: Any = self.sync
        try:
            self.does.close()
        finally:
            session._workerpools = self.declared, self.owner
            # Session(close_resets_only=False) would also keep a body from closing its session and going on.
            given: Any = type(session)
            session.__class__ = _ended(given)

    def _tell(self) -> None:
        attempt = current()
        task = "" if attempt is None else attempt.task
        if task in self.declared._told:
            return
        session = self.sync
        # An open transaction may only have read. Changes that were never flushed are certainly lost.
        lost = session.new or session.deleted or any(map(session.is_modified, session.dirty))
        level = logging.WARNING if lost else logging.DEBUG
        if logger.isEnabledFor(level):
            self.declared._told.add(task)
            logger.log(
                level,
                "%s returned with %s in %s, which is rolled back: with commit=False, the body calls commit()",
                task,
                "uncommitted changes" if lost else "an open transaction",
                self.declared._title(self.owner),
            )


class Sessions(Overridable[T]):
    """The declaration of a session: one per attempt.

    Args:
        engine: The resource whose engine the session uses.
        class_: The session's class.
        binds: Resources of other engines; None for none.
        commit: Whether the attempt commits the session.
        options: Other options of ``class_``.

    Raises:
        ConfigurationError: An argument is of no use.
    """

    __workerpools__ = True

    # What a subclass's sessions are.
    _adapter = "SQLAlchemyEngine"
    _base: type = Session
    _shown = "sqlalchemy.orm.Session"
    _engine_shown = "sqlalchemy.Engine"
    _asynchronous = False
    _instead = "; for an AsyncEngine, declare an AsyncTaskSession"
    #: What has the session's events, of the session.
    _events = ""

    def __init__(self, engine: Any, class_: Any, binds: Any, commit: Any, options: dict[str, Any]) -> None:
        super().__init__()
        name = type(self).__name__
        if _is_factory(engine):
            raise ConfigurationError(f"{name}: {self._instead_of_factory(engine)}")
        if not _is_resource(engine):
            raise ConfigurationError(
                f"{name}({_name_of(engine)}): wanted: the resource, so that each process has its own engine: "
                f"{name}(pools.add({self._adapter}(url)))"
            )
        adapter = getattr(engine, "adapter", None)
        if getattr(adapter, "asynchronous", self._asynchronous) is not self._asynchronous:
            raise ConfigurationError(f"{name}: the resource is not that of a {self._engine_shown}{self._instead}")
        if _is_factory(class_):
            raise ConfigurationError(f"{name}: class_={self._instead_of_factory(class_)}")
        if not (isinstance(class_, type) and issubclass(class_, self._base)):
            hint = self._instead if isinstance(class_, type) and issubclass(class_, (Session, AsyncSession)) else ""
            raise ConfigurationError(
                f"{name}: class_={_name_of(class_)}; wanted: {self._shown} or a subclass of it{hint}"
            )
        if not isinstance(commit, bool):
            raise ConfigurationError(f"{name}: commit={commit!r}; wanted: True or False")
        self._check_options(class_, options)
        self._engine: Any = engine
        self._class: Any = class_
        self._binds = self._checked(binds)
        self._commits = commit
        self._options = options
        self._name = "session"
        # The tasks whose uncommitted changes were logged.
        self._told: set[str] = set()

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self._where = self._where or f"{owner.__name__}.{name}"

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Self | T:
        if instance is None:
            return self
        if self._overrides:
            return self._overrides[-1]
        attempt = current()
        if attempt is None:
            title = self._title(type(instance))
            attempt = require(title, _ELSEWHERE.format(title))
        # A shortcut: bodies use their session often.
        found: InAttempt[T] | None = attempt.scoped.get(self)
        return self._make(attempt, instance) if found is None else found.session

    def get(self, *arguments: NoReturn, **options: NoReturn) -> T:
        """Return the session of the current attempt, created on first use: ``self.session`` for code without ``self``.

        Raises:
            NoAttemptError: No task body runs in the calling thread.
            TypeError: An argument was passed, probably meant for ``Session.get()``.
        """
        where = self._where or self._name
        title = f"{where}.get()"
        if arguments or options:
            raise TypeError(f"{title} takes no arguments; write {title}.get(…), or self.{self._name}.get(…) in a body")
        if self._overrides:
            return self._overrides[-1]
        attempt = current() or require(title, _ELSEWHERE.format(where))
        found: InAttempt[T] | None = attempt.scoped.get(self)
        return self._make(attempt, attempt.instance) if found is None else found.session

    def new(self) -> T:
        """Return a session of the caller's own, of no attempt: for web processes, scripts and tests.

        It has the declared class, options and engines. The caller commits and closes it:
        ``with ShopTask.session.new() as session, session.begin(): …``. In a task body its commits are effects.
        """
        if self._overrides:
            return self._overrides[-1]
        options, nobody = self._options, type(None)
        if self._binds:
            options = {
                **options,
                "binds": {key: self._engine_of(bind, None, nobody) for key, bind in self._binds.items()},
            }
        made: T = self._class(bind=self._engine_of(self._engine, None, nobody), **options)
        return made

    def _make(self, attempt: Attempt, instance: Any) -> T:
        owner, resource = type(instance), self._engine
        engine = resource.get() if instance is None else resource.__get__(instance, owner)
        self._check_engine(engine, resource, owner)
        options = self._options
        if self._binds:
            binds = {key: self._engine_of(bind, instance, owner) for key, bind in self._binds.items()}
            options = {**options, "binds": binds}
        found: Any = InAttempt()
        made: T = self._class(bind=engine, **options)
        found.session = found.sync = found.does = made
        found.declared, found.owner = self, owner
        attempt.scoped[self] = found
        return made

    def _title(self, owner: type) -> str:
        """Return what messages call it.

        Args:
            owner: The class of the task; ``NoneType`` if unknown.
        """
        return self._where or self._name if owner is type(None) else f"{owner.__name__}.{self._name}"

    def _refusal(self, name: str) -> str:
        if name not in EVENT_ATTRIBUTES:
            return ""
        where, attribute = self._place()
        return (
            f"{where} is the declaration, and each run has a session of its own: listen to sqlalchemy.orm.Session, or "
            f"to self.{attribute}{self._events} in a task body"
        )

    def _misplaced(self, name: str) -> str:
        where = self._where or self._name
        return (
            f"{where} is the declaration: the session exists in a task body, as self.{self._name}.{name}, or "
            f"{where}.get().{name} in a helper; elsewhere {_ELSEWHERE.format(where)}"
        )

    # Checks.

    def _engine_of(self, resource: Any, instance: Any, owner: type) -> Any:
        # A resource from settings depends on the task's app.
        engine = resource.get() if instance is None else resource.__get__(instance, owner)
        self._check_engine(engine, resource, owner)
        return engine

    def _check_engine(self, engine: Any, resource: Any, owner: type) -> None:
        # A test may substitute a Connection, which has a dialect too.
        dialect = getattr(engine, "dialect", None)
        if dialect is not None and bool(getattr(dialect, "is_async", False)) is self._asynchronous:
            return
        name = getattr(resource, "name", type(resource).__name__)
        raise ConfigurationError(
            f"{self._title(owner)}: the resource {name!r} is a {type(engine).__name__}, not a {self._engine_shown}; "
            f"{type(self).__name__} needs the resource of an engine{'' if dialect is None else self._instead}"
        )

    def _instead_of_factory(self, factory: Any) -> str:
        """Return what to write in place of a ``sessionmaker`` or ``scoped_session``."""
        maker = getattr(factory, "session_factory", factory)
        made = None if isinstance(maker, type) else getattr(maker, "class_", None)
        if made is not None and made.__name__ == made.__base__.__name__:
            # A factory's class is one of its own, derived from the one that it was given.
            made = made.__base__
        shown = "" if made in (None, self._base) else f"class_={made.__name__}, "
        return (
            f"{_name_of(factory)} makes sessions of its own, and a task's session is one per attempt already. Give the "
            f"resource of its engine, its class and its options instead: {type(self).__name__}(resource, {shown}…)"
        )

    def _check_options(self, class_: type, options: Mapping[str, Any]) -> None:
        name = type(self).__name__
        if "bind" in options:
            raise ConfigurationError(
                f"{name}: bind= is the first argument, and a resource, so that each process has its own engine: "
                f"{name}(pools.add({self._adapter}(url))); for several engines, binds={{Model: resource}}"
            )
        known: set[str] = set()
        # An asynchronous session passes what it does not know to a synchronous one.
        for base in (*(each for each in class_.__mro__ if issubclass(each, self._base)), Session):
            if "__init__" in vars(base):
                parameters = inspect.signature(base).parameters
                known.update(parameters)
                # The options that a subclass does not name are those of its base.
                if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                    break
        if unknown := options.keys() - known:
            # Session accepts autocommit only to reject all but False; do not suggest it.
            shown = refusal(unknown, known - {"autocommit"})
            module = "sqlalchemy.orm" if class_ is Session else class_.__module__
            raise ConfigurationError(f"{name}: {module}.{class_.__name__} has no option {shown}")

    def _checked(self, binds: Any) -> dict[Any, Any]:
        if binds is None:
            return {}
        name = type(self).__name__
        if not isinstance(binds, Mapping):
            raise ConfigurationError(
                f"{name}: binds is a {type(binds).__name__}; wanted: a dictionary {{Model: resource}}"
            )
        for key, resource in binds.items():
            if not isinstance(key, (type, sqlalchemy.TableClause, Mapper)):
                raise ConfigurationError(
                    f"{name}: binds has the key {key!r}; wanted: a mapped class, a table, or a base class"
                )
            if not _is_resource(resource):
                model = _name_of(key)
                raise ConfigurationError(
                    f"{name}: binds={{{model}: {_name_of(resource)}}}; wanted: a resource, so that each process has "
                    f"its own engine: {{{model}: pools.add({self._adapter}(url))}}"
                )
        return dict(binds)


class TaskSession(Sessions[S]):
    """A task body's session: one per attempt, created on first use and committed when the body returns.

    Otherwise it is rolled back and closed. As a class attribute it returns the session; on the class it is a handle,
    whose ``get()`` serves helpers without ``self``. A session that ``override()`` puts in its place belongs to the
    caller: no attempt commits, rolls back or closes it.

    Args:
        engine: The resource whose engine the session uses.
        class_: The session's class: ``sqlalchemy.orm.Session`` or a subclass.
        binds: Resources of other engines, by mapped class, table or base class, as for ``Session(binds=…)``. Each
            process uses its own engines.
        commit: Whether the attempt commits the session. If False, the body commits, and what is uncommitted when it
            returns is rolled back.
        options: Other options of ``class_``.

    Raises:
        ConfigurationError: ``engine`` or a value of ``binds`` is not a resource, ``class_`` is not a subclass of
            ``Session``, or it has no such option.
    """

    @overload
    def __init__(
        self,
        engine: Resource[sqlalchemy.Engine] | GivesEngine,
        *,
        class_: type[S],
        binds: Mapping[Any, Resource[sqlalchemy.Engine] | GivesEngine] | None = None,
        commit: bool = True,
        **options: Any,
    ) -> None: ...
    @overload
    def __init__(
        self: TaskSession[Session],
        engine: Resource[sqlalchemy.Engine] | GivesEngine,
        *,
        binds: Mapping[Any, Resource[sqlalchemy.Engine] | GivesEngine] | None = None,
        commit: bool = True,
        **options: Any,
    ) -> None: ...
    def __init__(self, engine: Any, *, class_: Any = Session, binds: Any = None, commit: Any = True, **options: Any):
        super().__init__(engine, class_, binds, commit, options)

    def serve(self, scoped: scoped_session[Any]) -> None:
        """Have a ``scoped_session`` give the attempt's session in task bodies; elsewhere it goes on as before.

        For models and services that use one for a web framework, such as Flask-SQLAlchemy's ``db.session``. Its
        ``remove()``, which a web framework calls at the end of its context, leaves the attempt's session alone.

        Args:
            scoped: The ``scoped_session``.

        Raises:
            ConfigurationError: ``scoped`` is something else, or serves another declaration already.
        """
        given: Any = scoped
        where = self._where or self._name
        if not isinstance(given, scoped_session):
            raise ConfigurationError(f"{where}.serve() takes a scoped_session, not {_name_of(given)}")
        registry: Any = given.registry
        if isinstance(registry, _InBodies):
            raise ConfigurationError(f"{where}.serve(): this scoped_session serves {registry.title} already")
        serving: Any = _InBodies(self, registry)
        given.registry = serving


class _InBodies:
    """The registry of a ``scoped_session`` that gives the attempt's session in task bodies."""

    def __init__(self, declared: TaskSession[Any], elsewhere: Any) -> None:
        self._declared = declared
        self._elsewhere = elsewhere

    @property
    def title(self) -> str:
        return self._declared._title(type(None))

    def __call__(self) -> Any:
        return self._elsewhere() if current() is None else self._declared.get()

    def has(self) -> bool:
        # Never in a body: what a framework removes at the end of its context, inside of one, is not the attempt's.
        return current() is None and self._elsewhere.has()

    def set(self, obj: Any) -> None:
        if current() is not None:
            raise ConfigurationError(f"in a task body this is the session of {self.title}, which has its options")
        self._elsewhere.set(obj)

    def clear(self) -> None:
        if current() is None:
            self._elsewhere.clear()


def current_session() -> Session:
    """Return the session of the current attempt, for helpers that serve tasks of several bases.

    It is the one session that the attempt has used; before its first use, the only one that its task declares, which
    is then created. Where there are several, say which: ``ShopTask.session.get()``.

    Raises:
        NoAttemptError: No task body runs in the calling thread.
        ConfigurationError: The attempt has several sessions, or its task declares none.
    """
    attempt = current() or require("current_session()", _ELSEWHERE.format("ShopTask.session"))
    used = [key for key in attempt.scoped if isinstance(key, TaskSession)]
    candidates: list[Any] = used or _declared(type(attempt.instance))
    if len(candidates) == 1:
        session: Session = candidates[0].get()
        return session
    task = attempt.task or "the task"
    if not candidates:
        raise ConfigurationError(
            f"current_session(): {task} declares no TaskSession and has used none; ask the class that declares it: "
            "ShopTask.session.get()"
        )
    names = sorted(found._where or found._name for found in candidates)
    raise ConfigurationError(
        f"current_session(): {task} {'has used' if used else 'declares'} several sessions ({', '.join(names)}); "
        f"say which: {names[0]}.get()"
    )


def _declared(cls: type) -> list[TaskSession[Any]]:
    names = {
        name for base in cls.__mro__ for name, value in vars(base).items() if hasattr(type(value), "__workerpools__")
    }
    # DatabaseTask's is made by this access.
    found = [getattr(cls, name) for name in sorted(names)]
    return list(dict.fromkeys(each for each in found if isinstance(each, TaskSession)))


def _is_resource(value: Any) -> bool:
    return not callable(value) and hasattr(type(value), "__get__")


_FACTORIES = (sessionmaker, scoped_session, async_sessionmaker, async_scoped_session)


def _is_factory(value: Any) -> bool:
    return isinstance(value, _FACTORIES) or value in _FACTORIES


def _name_of(value: Any) -> str:
    return str(getattr(value, "__name__", type(value).__name__))


class _Ended(Session):
    """Mixed into a session's class once its attempt has ended. A class of its own: live sessions need no check."""

    #: Its declaration, and the class of its task.
    _workerpools: tuple[Sessions[Any], type]

    def __init_subclass__(cls, **options: Any) -> None:
        # The user's class may want arguments for its subclasses.
        pass

    def begin(self, nested: bool = False) -> SessionTransaction:
        self._refuse()

    def get_bind(self, *arguments: Any, **options: Any) -> Any:
        # Called before every use of the database.
        self._refuse()

    def _refuse(self) -> NoReturn:
        self.close()
        declared, owner = self._workerpools
        title = declared._title(owner)
        raise NoAttemptError(
            f"{title}: the run of the task body that this session belonged to has ended, and its "
            "changes would never be committed. Return data from a body, not its session; elsewhere "
            + _ELSEWHERE.format(title)
        )


@cache
def _ended(class_: Any) -> type[Session]:
    return types.new_class(f"Ended{class_.__name__}", (_Ended, class_))
