"""PooledTask: the task base that gives resources to a body and runs the body inside an attempt."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any, cast

from celery import Celery, Task

from workerpools._celery.configured import ConfiguredResource
from workerpools._celery.pools import is_adapter
from workerpools._celery.request import TaskTerms
from workerpools._celery.settings import read_settings
from workerpools._pools.resource import Resource
from workerpools._run import attempts
from workerpools._run.attempts import Effect, declare_effect
from workerpools._run.deadline import Deadline
from workerpools._run.decision import RetryPolicy
from workerpools._run.loop import run
from workerpools.errors import ConfigurationError

__all__ = ["PooledTask"]


class PooledTask(Task):
    """A task base whose class attributes give each process its own clients.

    Every run of a body, in a worker, eager or called directly, is one attempt: what it did in its sessions is
    committed when it returns, before the result is stored and the message acknowledged, and rolled back on every
    other way out. After a failure of a connection the body runs again where that is safe.

    >>> from celery import Celery
    >>> from workerpools import PooledTask, WorkerPools
    >>> app = Celery("shop", set_as_current=False)
    >>> pools = WorkerPools(app)
    >>> class ShopTask(PooledTask):
    ...     prices = pools.add(lambda: {"teapot": 12})     # a client, in earnest
    >>> @app.task(base=ShopTask, bind=True, name="shop.price")
    ... def price(self, sku):
    ...     return self.prices[sku]
    >>> price("teapot")
    12
    >>> with ShopTask.prices.override({"teapot": 10}):
    ...     price("teapot")
    10

    Attributes:
        idempotent: Whether the body may run twice even if the first run may have done everything.
        replay: How often it runs again: a :class:`workerpools.RetryPolicy`, True for the default one, False for never.
    """

    abstract = True

    idempotent: bool = False
    replay: RetryPolicy | bool = True

    def __new__(cls, *args: Any, **kwargs: Any) -> PooledTask:
        # Before Celery registers it: what is refused later stays in app.tasks.
        _check_body(cls)
        task: PooledTask = super().__new__(cls)
        # On the instance, and before Celery wraps ``task.run`` for autoretry_for: that stands around the attempt then,
        # so that a failure to commit is retried like a failure of the body.
        task.run = _in_attempts(task)
        return task

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            if isinstance(value, (Resource, ConfiguredResource)) or hasattr(type(value), "__workerpools__"):
                _check_attribute(cls, name)
            if isinstance(value, Resource):
                value.check_name(f"{cls.__name__}.{name}")
            if is_adapter(value):
                made = type(value).__name__
                raise ConfigurationError(
                    f"{cls.__name__}.{name}: {made}(…) alone is no resource: {name} = pools.add({made}(…))"
                )

    def effect(self, what: str) -> None:
        """Say that the body did something that cannot be taken back and that no resource of the task sees.

        From here on this attempt is not run again, unless the task is idempotent. Call it just before it is done.

        Args:
            what: A short phrase for messages, without secrets: ``"sent the mail"``.

        Raises:
            NoAttemptError: No task body runs in this process.
        """
        declare_effect(what)

    @property
    def effects(self) -> tuple[Effect, ...]:
        """What left in the current attempt that cannot be taken back; empty outside one."""
        attempt = attempts.current()
        return () if attempt is None else attempt.effects

    @property
    def deadline(self) -> Deadline:
        """When this run must have ended, by the nearest of its limits; ``remaining()`` is None without any."""
        return attempts.deadline()

    @classmethod
    def bind(cls, app: Celery) -> Any:
        """Bind the task to ``app`` as Celery does, and the resources of the class to it.

        Raises:
            ConfigurationError: A ``workerpools_`` setting of the app, or the task's ``idempotent`` or ``replay``, is
                unknown or malformed. Raised here, it keeps a worker from starting, where a signal's receiver could
                only log it.
        """
        bound = super().bind(app)
        whose, idempotent = str(cls.name or cls.__name__), cast(Any, cls.idempotent)
        RetryPolicy.of(cls.replay, whose)
        if not isinstance(idempotent, bool):
            raise ConfigurationError(f"{whose}: idempotent={idempotent!r}; wanted: True or False")
        read_settings(app.conf)
        for name, resource in _resources(cls):
            if isinstance(resource, ConfiguredResource):
                resource.resource_for(app, name)
            elif not resource.pools.has_app:
                # Celery registers a task with every app of the process: an app that was chosen stays the only one.
                resource.pools.init_app(app)
        return bound


def _resources(cls: type) -> Iterator[tuple[str, Resource[Any] | ConfiguredResource[Any]]]:
    for base in cls.__mro__:
        for name, value in vars(base).items():
            if isinstance(value, (Resource, ConfiguredResource)):
                yield name, value


def _check_attribute(cls: type, name: str) -> None:
    for owner, whose in ((Task, "Celery's Task"), (PooledTask, "PooledTask")):
        if hasattr(owner, name):
            raise ConfigurationError(
                f"{cls.__name__}.{name}: {whose} has an attribute {name!r}, which the resource would hide; "
                "choose another attribute name"
            )


def _check_body(cls: Any) -> None:
    """Refuse a body of which a call runs nothing: Celery would drop what it returns, and call that success."""
    body = next((vars(base)["run"] for base in cls.__mro__ if "run" in vars(base)), None)
    body = getattr(body, "__func__", body)
    if inspect.iscoroutinefunction(body) or inspect.isasyncgenfunction(body):
        what = "async def, and asynchronous bodies are not supported in this version; make it a plain function"
    elif inspect.isgeneratorfunction(body):
        what = "a generator function, which a call does not run; make it a plain function, without yield"
    else:
        return
    raise ConfigurationError(f"{cls.name or cls.__name__}: the body is {what}")


def _in_attempts(task: PooledTask) -> Any:
    cls, terms = type(task), TaskTerms(task)
    known: Any = None
    original: Any = None

    @functools.wraps(task.run)
    def run_in_attempts(*args: Any, **kwargs: Any) -> Any:
        nonlocal known, original
        # Looked at in each call: Celery's task_annotations may replace the class's run after the task was made.
        function = cls.run
        if function is not known:
            original, known = _bound_run(task, cls), function
        return run(original, terms, args, kwargs)

    return run_in_attempts


def _bound_run(task: PooledTask, cls: type) -> Any:
    for base in cls.__mro__:
        if "run" in vars(base):
            return vars(base)["run"].__get__(task, cls)
    raise NotImplementedError("Tasks must define the run method.")
