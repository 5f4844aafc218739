"""The asynchronous session of a task body: one per attempt, which the attempt's own thread commits or rolls back."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, overload

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from workerpools.adapter import Attempt, Resource, deadline, on_loop, run_coroutine, start_coroutine
from workerpools.sqlalchemy._session import GivesEngine, Sessions
from workerpools.sqlalchemy._timeouts import FLOOR, GRACE

if TYPE_CHECKING:
    # A dependency of SQLAlchemy. With the default, an annotation ``AsyncTaskSession`` needs no argument.
    from typing_extensions import TypeVar

    S = TypeVar("S", bound=AsyncSession, default=AsyncSession)
else:
    from typing import TypeVar

    S = TypeVar("S")

__all__ = ["AsyncTaskSession"]

#: How long the end of a session may take after the deadline, in seconds: the server, then the watchdog, end it before.
LEAST = FLOOR + 2 * GRACE


class AsyncTaskSession(Sessions[S]):
    """The session of an ``async def`` body: one per attempt, created on first use, committed when the body returns.

    What holds for :class:`TaskSession` holds for it. What ``asyncio.gather()`` starts in a body shares it, and
    SQLAlchemy refuses to use one ``AsyncSession`` from two tasks at the same time.

    Args:
        engine: The resource of an :class:`AsyncSQLAlchemyEngine`.
        class_: The session's class: ``sqlalchemy.ext.asyncio.AsyncSession`` or a subclass.
        binds: Resources of other asynchronous engines, by mapped class, table or base class.
        commit: Whether the attempt commits the session. If False, the body commits, and what is uncommitted when it
            returns is rolled back.
        options: Other options of ``class_``.

    Raises:
        ConfigurationError: As for :class:`TaskSession`.
    """

    _adapter = "AsyncSQLAlchemyEngine"
    _base = AsyncSession
    _shown = "sqlalchemy.ext.asyncio.AsyncSession"
    _engine_shown = "sqlalchemy.ext.asyncio.AsyncEngine"
    _asynchronous = True
    _instead = "; for an Engine, declare a TaskSession"
    _events = ".sync_session"

    @overload
    def __init__(
        self,
        engine: Resource[AsyncEngine] | GivesEngine,
        *,
        class_: type[S],
        binds: Mapping[Any, Resource[AsyncEngine] | GivesEngine] | None = None,
        commit: bool = True,
        **options: Any,
    ) -> None: ...
    @overload
    def __init__(
        self: AsyncTaskSession[AsyncSession],
        engine: Resource[AsyncEngine] | GivesEngine,
        *,
        binds: Mapping[Any, Resource[AsyncEngine] | GivesEngine] | None = None,
        commit: bool = True,
        **options: Any,
    ) -> None: ...
    def __init__(
        self, engine: Any, *, class_: Any = AsyncSession, binds: Any = None, commit: Any = True, **options: Any
    ):
        super().__init__(engine, class_, binds, commit, options)

    def _make(self, attempt: Attempt, instance: Any) -> S:
        made = super()._make(attempt, instance)
        found = attempt.scoped[self]
        found.sync, found.does = made.sync_session, _Waiting(made)
        return made


class _Waiting:
    """Ends a session, and waits for that in the attempt's thread."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    def commit(self) -> None:
        # A COMMIT has its own time after the deadline, and so has the question what became of a lost one. On the event
        # loop nothing can wait for it: the attempt fails.
        run_coroutine(self._session.commit(), least=(deadline().remaining() or 0.0) + 2 * LEAST)

    def rollback(self) -> None:
        _end(self._session.rollback)

    def close(self) -> None:
        _end(self._session.close)

    def invalidate(self) -> None:
        _end(self._session.invalidate)


def _end(step: Callable[[], Coroutine[Any, Any, None]]) -> None:
    if on_loop():
        start_coroutine(step())
    else:
        run_coroutine(step(), least=LEAST)
