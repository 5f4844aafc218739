"""Django's own connections in Celery tasks: one transaction per run, kept between tasks, replayed where safe."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from celery import Celery, signals
from celery.result import AsyncResult
from celery.utils import uuid
from django.db import DEFAULT_DB_ALIAS, connections, transaction

from workerpools._celery import messages
from workerpools._celery.configured import ConfiguredResource
from workerpools._celery.task import PooledTask
from workerpools._process import fork
from workerpools.adapter import current, refusal
from workerpools.django._connections import inherited, is_initialized, watch
from workerpools.django._databases import Databases, DjangoDatabases
from workerpools.django._transactions import Transactions, begin
from workerpools.errors import ConfigurationError

__all__ = ["DjangoTask"]


class DjangoTask(PooledTask):
    """A task base for bodies that use Django's ORM: each run is one ``transaction.atomic()``.

    It is committed when the body returns, and rolled back otherwise. Where a connection turns out to be dead, the body
    runs again if nothing was done.

    Attributes:
        atomic: The aliases of the databases on which each run is a transaction; ``()`` for none.

    Raises:
        ConfigurationError: On creating the task: its body is ``async def``. When it is bound to its app: ``atomic`` is
            not a sequence of aliases in ``settings.DATABASES``, or one of them has ``AUTOCOMMIT`` turned off.
    """

    abstract = True

    atomic: Sequence[str] = (DEFAULT_DB_ALIAS,)
    django: ConfiguredResource[Databases] = ConfiguredResource(DjangoDatabases)

    def __new__(cls, *args: Any, **kwargs: Any) -> DjangoTask:
        if inspect.iscoroutinefunction(inspect.unwrap(cast(Any, getattr(cls.run, "__func__", cls.run)))):
            raise ConfigurationError(
                f"{cls.name or cls.__name__}: the body is async def, which Django's transactions do not support; make "
                "it a plain function"
            )
        return cast("DjangoTask", super().__new__(cls, *args, **kwargs))

    @classmethod
    def bind(cls, app: Celery) -> Any:
        """Bind the task to ``app`` as Celery does.

        Args:
            app: The Celery app.

        Raises:
            ConfigurationError: ``atomic`` is malformed, or any error of :meth:`PooledTask.bind`.
        """
        _check(str(cls.name or cls.__name__), cls.atomic)
        install()
        return super().bind(app)

    def _enclosed(self, body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def in_transactions(*args: Any, **kwargs: Any) -> Any:
            begin(self.django, self.atomic)
            return body(*args, **kwargs)

        return in_transactions

    def apply_async_on_commit(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult:
        """Send the task like ``apply_async()``, once the calling code's transaction is committed.

        In a body that is its run's; elsewhere, in a view say, that of the database ``default``. Where there is none, it
        is sent at once, or waits as :meth:`PooledTask.apply_async_on_commit` does.

        Args:
            args: The task's positional arguments.
            kwargs: The task's keyword arguments.
            options: The options of ``apply_async()``. ``countdown`` and ``expires`` count from the commit.

        Returns:
            The task's result, under the id that it will have.

        Raises:
            TypeError: The task cannot be called with these arguments.
            kombu.exceptions.EncodeError: They cannot be serialized.
        """
        send = super().apply_async_on_commit
        using = _in_transaction_of()
        if using is None:
            return send(args, kwargs, **options)
        messages.check(self, args, kwargs, options)
        options["task_id"] = options.get("task_id") or uuid()
        transaction.on_commit(partial(send, args, kwargs, **options), using=using)
        result: Any = self.AsyncResult(options["task_id"])
        result.ignored = options.get("ignore_result", self.ignore_result)
        return result


def install() -> None:
    """Watch Django's connections, and keep those of tasks from Celery's clean-up. Idempotent."""
    watch()
    fork.guard(inherited)
    # Celery connects its clean-up when the worker starts, after Django's apps are ready: this one comes first.
    signals.task_postrun.connect(_after_task, weak=False, dispatch_uid="workerpools.django")


def _after_task(task: Any = None, **_: Any) -> None:
    if isinstance(task, DjangoTask) and not task.request.is_eager:
        task.django.put_away()


def _in_transaction_of() -> str | None:
    """Return the alias of the database whose transaction the calling code is in; None if it is in none."""
    attempt = current()
    found = () if attempt is None else attempt.scoped.values()
    for each in found:
        if isinstance(each, Transactions):
            return next((alias for alias, begun in each.begun.items() if begun.wrapper.in_atomic_block), None)
    if is_initialized(DEFAULT_DB_ALIAS) and connections[DEFAULT_DB_ALIAS].in_atomic_block:
        return str(DEFAULT_DB_ALIAS)
    return None


def _check(whose: str, aliases: Any) -> None:
    if isinstance(aliases, str) or not isinstance(aliases, Sequence):
        raise ConfigurationError(f"{whose}: atomic={aliases!r}; wanted: a sequence of aliases, like ('default',)")
    known = set(connections)
    if unknown := set(aliases) - known:
        raise ConfigurationError(f"{whose}: atomic={aliases!r}: settings.DATABASES has no {refusal(unknown, known)}")
    for alias in aliases:
        if not cast(Any, connections.settings)[alias]["AUTOCOMMIT"]:
            raise ConfigurationError(
                f"{whose}: the database {alias!r} has AUTOCOMMIT turned off, and atomic() never commits there; remove "
                "the setting, or leave the database out of atomic"
            )
