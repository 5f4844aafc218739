"""The transactions of one attempt: one on each chosen database, from its begin to its end."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from django.db import transaction
from django.db.transaction import TransactionManagementError

from workerpools.adapter import Attempt, Effect, Failure, Lease, Phase, Scoped, current, deadline, on_commit, scoped
from workerpools.django._connections import pool_of, watcher_of
from workerpools.django._databases import Databases
from workerpools.django._errors import (
    IDLE,
    IN_ERROR,
    classify_connect,
    classify_lost,
    code_of,
    driver_error,
    is_lost,
    may_end,
    status_of,
)

__all__ = ["Transactions", "begin"]

#: How long a statement may take after the deadline, in seconds: a task that handles its time limit may have to record
#: that in the database.
FLOOR = 1.0

#: How long after the deadline a server that has not ended a statement counts as unreachable, in seconds: less than the
#: deadline's margin before Celery's own limit.
GRACE = 0.08

#: Shortens the timeout of the transaction; never extends one that the role or the body has set. In milliseconds.
_LIMIT = (
    "SELECT set_config('statement_timeout', LEAST({0}, COALESCE(NULLIF(setting::bigint, 0), {0}))::text, true)"
    " FROM pg_settings WHERE name = 'statement_timeout'"
)


def begin(databases: Databases, aliases: Sequence[str]) -> None:
    """Begin the transactions of the current attempt, unless it has them.

    Args:
        databases: Django's databases in this process.
        aliases: On which of them.

    Raises:
        NoAttemptError: No attempt runs in the calling context.
        Exception: Django's error of connecting.
    """
    databases.attempt_begins()
    if aliases:
        attempt = current()
        found = scoped(databases, lambda: Transactions(databases, attempt), "a transaction of a DjangoTask")
        for alias in aliases:
            found.begin(alias)


class Transactions(Scoped):
    """The transactions of one attempt, committed in the order in which they were begun.

    Args:
        databases: Django's databases in this process.
        attempt: The attempt.
    """

    def __init__(self, databases: Databases, attempt: Attempt | None) -> None:
        self._databases = databases
        self._attempt = attempt
        self.begun: dict[str, Transaction] = {}

    def begin(self, alias: str) -> None:
        """Begin a transaction on a database, unless this attempt has one there.

        Raises:
            Exception: Django's error of connecting.
        """
        if alias not in self.begun:
            self.begun[alias] = begun = Transaction(self._databases, self._attempt, alias)
            begun.begin()

    def finish(self) -> bool:
        committed = False
        for each in self.begun.values():
            committed = each.finish() or committed
        return committed

    def rollback(self) -> None:
        for each in reversed(self.begun.values()):
            each.rollback()

    def invalidate(self) -> None:
        for each in self.begun.values():
            each.throw_away()

    def end(self) -> None:
        while self.begun:
            # Removed when it has ended: a signal may interrupt it.
            alias, each = next(reversed(self.begun.items()))
            each.end()
            self.begun.pop(alias, None)


class Transaction:
    """One ``transaction.atomic()``, and what is known of it.

    Args:
        databases: Django's databases in this process.
        attempt: Its attempt.
        alias: The database.
    """

    def __init__(self, databases: Databases, attempt: Attempt | None, alias: str) -> None:
        self._databases, self._attempt, self._alias = databases, attempt, alias
        self._opening = databases.opening
        self.wrapper = databases.take(alias)
        #: Whether it is a transaction of its own: not a savepoint in one that was open before, as in a TestCase.
        self.is_own = not self.wrapper.in_atomic_block
        #: Whether the end of the connection proves that nothing was done.
        self._proves = self.wrapper.vendor == "postgresql"
        self._watcher = watcher_of(self.wrapper)
        self._outer = self._watcher.transaction
        self._atomic: Any = transaction.atomic(using=alias)
        self._lease: Lease | None = None
        self._entered = self._done = self._reported = False
        #: Whether the server has begun it.
        self._begun = False
        self._effect: Effect | None = None
        #: The timeout of its statements, in milliseconds; None without one.
        self._timeout: int | None = None

    def begin(self) -> None:
        """Enter the block. With an open connection, nothing is sent: BEGIN goes with the first statement.

        Raises:
            Exception: Django's error of connecting.
        """
        wrapper, opening = self.wrapper, self._opening
        self._lease = lease = opening.wait()
        started = time.monotonic()
        self._databases.opened_here = None
        try:
            wrapper.ensure_connection()
            self._watcher.transaction = self
            self._atomic.__enter__()
        except Exception as error:
            original = driver_error(error)
            lease.gave_up(timed_out=type(original).__name__ == "PoolTimeout")
            if original is not None and self._proves and self.is_own:
                opening.failed(error, classify_connect(original))
            raise
        self._entered = True
        self._databases.seen(wrapper)
        reused = self._databases.opened_here is not wrapper.connection
        # psycopg's pool opens connections in threads of its own.
        creating = 0.0 if reused or pool_of(wrapper) is not None else time.monotonic() - started
        if creating:
            opening.created(creating)
        lease.acquired(reused=reused, creating=creating)

    # While it is open.

    def execute(self, execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: Any) -> Any:
        """Execute one statement of the body.

        Raises:
            Exception: Django's error, unchanged.
        """
        if not self._proves:
            self._note(f"a statement on {self._alias!r} ({self.wrapper.vendor})")
            return execute(sql, params, many, context)
        connection = self.wrapper.connection
        if self._begun and status_of(connection) == IDLE:
            self._note(f"the end of the transaction on {self._alias!r} within the body")
        ends = may_end(sql)
        if ends:
            self._note(f"a statement on {self._alias!r} that may commit")
        at = deadline().at
        started, answered = time.monotonic(), [True]
        try:
            with self._bounded(connection, at, answered):
                if at is not None:
                    self._limit(connection, at)
                result = execute(sql, params, many, context)
        except Exception as error:
            self._failed(error, connection, Phase.STATEMENT, at, started, shut_down=not answered[0], unknown=ends)
            raise
        self._begun = True
        return result

    def _note(self, what: str) -> None:
        if self._effect is None:
            self._effect = self._opening.effect(what)

    def _limit(self, connection: Any, at: float) -> None:
        if status_of(connection) == IN_ERROR:
            return
        remaining = at - time.monotonic()
        wanted = remaining if remaining > 0.0 else FLOOR
        milliseconds = math.floor(wanted * 1000)
        if self._timeout is not None and self._timeout <= milliseconds:
            return
        # Shorter by a little, so that one setting serves several statements.
        slack = min(1.0, max(0.05, wanted / 20), wanted / 2) / 2
        timeout = max(1, milliseconds - math.floor(slack * 1000))
        # Past Django: it is none of the body's statements.
        with self.wrapper.wrap_database_errors, connection.cursor() as cursor:
            cursor.execute(_LIMIT.format(timeout))
        self._timeout = timeout

    @contextlib.contextmanager
    def _bounded(
        self, connection: Any, at: float | None, answered: list[bool] | None = None
    ) -> Generator[None, None, None]:
        """Shut the socket down when the deadline has passed and the server has not answered; note that it did not."""
        if at is None or connection is None or connection.closed:
            yield
            return
        now = time.monotonic()
        watchdog = self._databases.watchdog
        watch = watchdog.watch(connection.fileno(), (at if at > now else now + FLOOR) + GRACE)
        try:
            yield
        finally:
            in_time = watchdog.forget(watch)
            if answered is not None:
                answered[0] = in_time

    def _failed(
        self,
        error: Exception,
        connection: Any,
        phase: Phase,
        at: float | None,
        started: float,
        *,
        shut_down: bool,
        unknown: bool = False,
    ) -> Failure | None:
        """Report what an error means; return the failure."""
        original = driver_error(error)
        if original is None or self.wrapper.closed_in_transaction:
            # Django's own refusal, or the body has closed the connection.
            return None
        self._reported = True
        now = time.monotonic()
        if at is not None and phase is Phase.STATEMENT:
            limited = code_of(original) == "57014" and self._timeout is not None
            if shut_down or (limited and (now >= at or (now - started) * 1000 >= (self._timeout or 0) - 1)):
                self._opening.failed(error, None, phase=phase, deadline=True)
                return None
        lost = is_lost(original, connection)
        if lost:
            self._databases.lost(self.wrapper)
        failure = classify_lost(original, lost=lost, phase=phase, unknown=unknown)
        # A savepoint's failure is that of the transaction around it, of which this run knows nothing.
        self._opening.failed(error, failure if self.is_own else None, phase=phase)
        return failure

    # Its end.

    def finish(self) -> bool:
        """Commit; return whether there was a transaction.

        Raises:
            TransactionManagementError: The body caught an error that the server does not forget, left a block open, or
                closed the connection.
            Exception: Django's error of the COMMIT.
        """
        if self._done or not self._entered:
            return False
        wrapper = self.wrapper
        if wrapper.atomic_blocks[-1:] != [self._atomic]:
            raise TransactionManagementError(f"the body left a block of atomic() open on {self._alias!r}")
        if not self.is_own or not self._proves:
            if self.is_own:
                self._note(f"COMMIT on {self._alias!r}")
            hooks = self._take_hooks()
            self._done = True
            self._atomic.__exit__(None, None, None)
            self._release(hooks)
            return True
        connection = wrapper.connection
        if wrapper.closed_in_transaction or connection is None:
            raise TransactionManagementError(
                f"the body closed its connection to {self._alias!r}, and the server rolled its transaction back: leave "
                "the closing to Django"
            )
        status = status_of(connection)
        caught = getattr(wrapper, "rollback_exc", None)
        if status == IN_ERROR or (wrapper.needs_rollback and caught is not None):
            raise TransactionManagementError(
                f"the transaction on {self._alias!r} was aborted by an error that the body caught, and would be rolled "
                "back: run what may fail in a block of atomic() of its own, and catch its error outside"
            ) from caught
        if self._begun and status == IDLE:
            self._note(f"the end of the transaction on {self._alias!r} within the body")
        effect = None
        if status != IDLE and not wrapper.needs_rollback:
            effect = self._opening.effect(f"COMMIT on {self._alias!r}")
        # set_rollback(True): what the body asked for.
        hooks = [] if wrapper.needs_rollback else self._take_hooks()
        at, started = deadline().at, time.monotonic()
        self._done = True
        try:
            with self._bounded(connection, at):
                self._atomic.__exit__(None, None, None)
        except Exception as error:
            original = driver_error(error)
            if original is not None:
                if effect is not None and not is_lost(original, connection):
                    # The server replied that it did not commit.
                    effect.withdraw()
                self._failed(error, connection, Phase.COMMIT, at, started, shut_down=False)
            raise
        self._release(hooks)
        return True

    def _take_hooks(self) -> list[Any]:
        """Return what ``transaction.on_commit()`` registered, which Django does not call then."""
        if not self.is_own:
            return []
        hooks, self.wrapper.run_on_commit = self.wrapper.run_on_commit, []
        return list(hooks)

    def _release(self, hooks: list[Any]) -> None:
        for _, function, *_ in hooks:
            what = getattr(function, "__qualname__", type(function).__qualname__)
            if not on_commit(function, what, self._attempt):
                function()

    def rollback(self) -> None:
        """Leave the block with a rollback."""
        wrapper = self.wrapper
        if not self._entered or self._done:
            return
        self._done = True
        connection = wrapper.connection
        if wrapper.atomic_blocks[-1:] != [self._atomic]:
            self.throw_away()
            return
        if self._proves and self.is_own and (connection is None or connection.closed):
            if not self._reported:
                self._databases.lost_unseen(wrapper)
            self.throw_away()
            return
        wrapper.needs_rollback = True
        with self._bounded(connection if self._proves else None, time.monotonic()):
            self._atomic.__exit__(None, None, None)

    def throw_away(self) -> None:
        """Close the connection, and have the thread open another one."""
        self._done = True
        if self.is_own:
            self._databases.throw_away(self.wrapper)
        elif self.wrapper.in_atomic_block:
            self.wrapper.needs_rollback = True

    def end(self) -> None:
        """Give the connection back."""
        if self._watcher.transaction is self:
            self._watcher.transaction = self._outer
        wrapper = self.wrapper
        connection = wrapper.connection if self._proves else None
        if self.is_own and (wrapper.in_atomic_block or (connection is not None and status_of(connection) != IDLE)):
            # A signal interrupted its begin or its end.
            self.throw_away()
        if self._lease is not None:
            self._lease.returned()
        self._databases.settle()
