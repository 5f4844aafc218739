"""PooledTask: the task base that provides resources to a body and runs it inside an attempt."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

from celery import Celery, Task
from celery.result import AsyncResult

from workerpools._celery import messages
from workerpools._celery.configured import ConfiguredResource
from workerpools._celery.pools import is_adapter
from workerpools._celery.request import TaskTerms
from workerpools._celery.settings import read_settings
from workerpools._pools.awaited import AwaitedResource, opening
from workerpools._pools.injection import fill, hide, injected
from workerpools._pools.resource import Resource
from workerpools._run import attempts
from workerpools._run.attempts import Effect, declare_effect
from workerpools._run.deadline import Deadline
from workerpools._run.delivery import RetryPolicy
from workerpools._run.loop import run
from workerpools.errors import ConfigurationError

__all__ = ["PooledTask"]


class PooledTask(Task):
    """A task base whose resources are class attributes, with one client per process.

    Each run of the body, in a worker, eager or called directly, is one attempt. Its sessions are committed when the
    body returns, before the result is stored and the message acknowledged, and rolled back otherwise. After a
    connection failure the body runs again if that is safe.

    >>> from celery import Celery
    >>> from workerpools import PooledTask, WorkerPools
    >>> app = Celery("shop", set_as_current=False)
    >>> pools = WorkerPools(app)
    >>> class ShopTask(PooledTask):
    ...     prices = pools.add(lambda: {"teapot": 12})     # a client in a real app
    >>> @app.task(base=ShopTask, bind=True, name="shop.price")
    ... def price(self, sku):
    ...     return self.prices[sku]
    >>> price("teapot")
    12
    >>> with ShopTask.prices.override({"teapot": 10}):
    ...     price("teapot")
    10

    Attributes:
        idempotent: Whether the body may run again although the first run may have completed.
        replay: How often the body runs again: a :class:`workerpools.RetryPolicy`, True for the default policy, False
            for never.
        publish: When the messages that the body sends leave: ``"at_once"``, or ``"on_commit"`` to hold every one of
            them until its sessions are committed.

    Raises:
        ConfigurationError: On subclassing: a resource's name is an attribute of Celery's ``Task`` or of ``PooledTask``,
            or an adapter was assigned without ``pools.add()``. On creating the task: its body is a generator function,
            or ``async def`` with ``pydantic=True``; an injected parameter is positional-only; or ``idempotent``,
            ``replay``, ``publish`` or a ``workerpools_`` setting of the app is malformed.
    """

    abstract = True

    idempotent: bool = False
    replay: RetryPolicy | bool = True
    publish: Literal["at_once", "on_commit"] = "at_once"

    def __new__(cls, *args: Any, **kwargs: Any) -> PooledTask:
        # Before Celery registers the task: one that is refused later stays in app.tasks.
        _check_body(cls)
        task: PooledTask = super().__new__(cls)
        # On the instance, before Celery wraps ``task.run`` for autoretry_for: its wrapper then encloses the attempt,
        # and a failed commit is retried like a failed body.
        task.run = _in_attempts(task)
        if parameters := injected(_bound_run(task, cls), _whose(cls)):
            hide(parameters, task)
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
                    f"{cls.__name__}.{name}: {made}(…) is not a resource yet; add it: {name} = pools.add({made}(…))"
                )

    def _enclosed(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """Return what an attempt runs for the body; for bases that begin something before it."""
        return body

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> AsyncResult:
        """Send the task like ``delay()``, once the calling body is committed: see :meth:`apply_async_on_commit`.

        Args:
            args: The task's positional arguments.
            kwargs: The task's keyword arguments.

        Returns:
            The task's result, under the id that it will have.

        Raises:
            TypeError: The task cannot be called with these arguments.
            kombu.exceptions.EncodeError: They cannot be serialized.
        """
        return self.apply_async_on_commit(args, kwargs)

    def apply_async_on_commit(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult:
        """Send the task like ``apply_async()``, once the body that calls this is committed.

        It is sent after the last of the body's sessions is committed, in the order of the calls; not at all if the body
        is rolled back, replayed or retried. Where no body runs, it is sent at once. A failure to send it is logged.

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
        return messages.send_on_commit(self, args, kwargs, options)

    # These end the run that sends the message: it cannot wait for a commit that will not come.

    def retry(self, *args: Any, **options: Any) -> Any:
        """Retry the task as Celery does, whatever ``publish`` says.

        Args:
            args: The arguments of Celery's ``Task.retry()``.
            options: Its options.
        """
        with messages.at_once():
            return super().retry(*args, **options)

    def replace(self, sig: Any) -> Any:
        """Replace the task as Celery does, whatever ``publish`` says.

        Args:
            sig: The signature to replace it with.
        """
        with messages.at_once():
            return super().replace(sig)

    def effect(self, what: str) -> None:
        """Declare an effect that cannot be undone and that no resource of the task sees.

        From here on the body is not run again, unless the task is idempotent. Call it just before the effect.

        Args:
            what: A short phrase for messages, without secrets: ``"sent the mail"``.

        Raises:
            NoAttemptError: No task body is running.
        """
        declare_effect(what)

    def idempotency_key(self, name: str) -> str:
        """Return a key for a request of this task that is the same however often the task runs.

        It is derived from the task's id, its name and ``name``: the same in replays, retries and further deliveries.
        Send it as ``Idempotency-Key``.

        Args:
            name: What the request does, once per task: ``"charge"``; where a body does it several times, with what
                differs: ``f"charge-{order_id}"``.

        Raises:
            ConfigurationError: ``name`` is empty or not a text.
            NoAttemptError: No task body runs in the calling thread.
        """
        if not isinstance(cast(Any, name), str) or not name.strip():
            raise ConfigurationError(f"idempotency_key({name!r}); wanted: what the request does, like 'charge'")
        attempt = attempts.current() or attempts.require("idempotency_key()")
        return "" if attempt.delivery is None else attempt.delivery.key(str(self.name), name)

    @property
    def effects(self) -> tuple[Effect, ...]:
        """The effects of the current attempt; empty outside an attempt."""
        attempt = attempts.current()
        return () if attempt is None else attempt.effects

    @property
    def deadline(self) -> Deadline:
        """The deadline of this run, from the nearest of its limits; ``remaining()`` is None without a limit."""
        return attempts.deadline()

    @classmethod
    def bind(cls, app: Celery) -> Any:
        """Bind the task to ``app`` as Celery does, and the class's resources too.

        Args:
            app: The Celery app.

        Returns:
            The result of Celery's ``Task.bind()``.

        Raises:
            ConfigurationError: A ``workerpools_`` setting of the app is unknown or malformed, or the task's
                ``idempotent``, ``replay`` or ``publish`` is. Raised here, it keeps the worker from starting; a signal
                receiver could only log it.
        """
        bound = super().bind(app)
        whose, idempotent = _whose(cls), cast(Any, cls.idempotent)
        RetryPolicy.of(cls.replay, whose)
        if not isinstance(idempotent, bool):
            raise ConfigurationError(f"{whose}: idempotent={idempotent!r}; wanted: True or False")
        publish = cast(Any, cls.publish)
        if publish not in messages.PUBLISH:
            raise ConfigurationError(f"{whose}: publish={publish!r}; wanted: 'at_once' or 'on_commit'")
        if publish == "on_commit":
            messages.hold()
        read_settings(app.conf)
        for name, resource in _resources(cls):
            if isinstance(resource, ConfiguredResource):
                resource.resource_for(app, name)
            elif not resource.pools.has_app:
                # Celery binds a task to every app of the process: keep the app that was chosen.
                resource.pools.init_app(app)
        return bound


def _resources(cls: type) -> Iterator[tuple[str, Resource[Any] | ConfiguredResource[Any]]]:
    for base in cls.__mro__:
        for name, value in vars(base).items():
            if isinstance(value, (Resource, ConfiguredResource)):
                yield name, value
    for _, _, handle in injected(_bound_run(None, cls), _whose(cls)):
        if isinstance(handle, (Resource, ConfiguredResource)):
            yield "", handle


def _whose(cls: Any) -> str:
    return str(cls.name or cls.__name__)


_ABSENT = object()


def _check_attribute(cls: type, name: str) -> None:
    for owner, whose in ((Task, "Celery's Task"), (PooledTask, "PooledTask")):
        # Without getattr(): Task.app and Task.backend would bind Celery's class itself to the current app.
        if inspect.getattr_static(owner, name, _ABSENT) is not _ABSENT:
            raise ConfigurationError(
                f"{cls.__name__}.{name}: {whose} has an attribute {name!r}, which the resource would hide; "
                "choose another attribute name"
            )


def _check_body(cls: Any) -> None:
    """Refuse a body that does not run when called: Celery would drop the returned object and report success."""
    body = next((vars(base)["run"] for base in cls.__mro__ if "run" in vars(base)), None)
    body = getattr(body, "__func__", body)
    # Celery's wrapper of a body with pydantic=True: the one function of that module that is a body.
    modelled = getattr(body, "__globals__", {}).get("__name__") == "celery.app.base"
    if modelled:
        body = inspect.unwrap(cast(Any, body))
    if modelled and inspect.iscoroutinefunction(body):
        what = (
            "async def with pydantic=True, with which Celery would dump the coroutine, not its result; leave out "
            "pydantic=True, and take and return plain values"
        )
    elif inspect.isasyncgenfunction(body):
        what = "an asynchronous generator function, which a call does not run; make it a coroutine, without yield"
    elif inspect.isgeneratorfunction(body):
        what = "a generator function, which a call does not run; make it a plain function, without yield"
    else:
        return
    raise ConfigurationError(f"{_whose(cls)}: the body is {what}")


def _in_attempts(task: PooledTask) -> Any:
    cls, terms = type(task), TaskTerms(task)
    known: Any = None
    original: Any = None

    @functools.wraps(task.run)
    def run_in_attempts(*args: Any, **kwargs: Any) -> Any:
        nonlocal known, original
        # Checked on each call: Celery's task_annotations may replace the class's run after the task is created.
        function = cls.run
        if function is not known:
            body = _bound_run(task, cls)
            parameters = injected(body, _whose(cls))
            original, known = task._enclosed(fill(body, parameters, task) if parameters else body), function
            if inspect.iscoroutinefunction(inspect.unwrap(getattr(body, "__func__", body))):
                awaited = [found for _, found in _resources(cls) if isinstance(found, AwaitedResource)]
                original = opening(original, awaited) if awaited else original
        return run(original, terms, args, kwargs)

    return run_in_attempts


def _bound_run(task: PooledTask | None, cls: type) -> Any:
    for base in cls.__mro__:
        if "run" in vars(base):
            return vars(base)["run"].__get__(task, cls)
    raise NotImplementedError("Tasks must define the run method.")
