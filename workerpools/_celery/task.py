"""PooledTask: the task base that gives resources to a body and runs the body inside an attempt."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from celery import Celery, Task

from workerpools._celery.app import WorkerPools
from workerpools._celery.configured import ConfiguredResource
from workerpools._celery.settings import read_settings
from workerpools._core.events import EventKind
from workerpools._core.resource import Resource
from workerpools._core.runner import run
from workerpools.errors import ConfigurationError

if TYPE_CHECKING:
    from workerpools._core.scope import Stale

__all__ = ["PooledTask"]


class PooledTask(Task):
    """A task base whose class attributes give each process its own clients.

    Every run of a body, in a worker, eager or called directly, is one attempt: what it did in its sessions is
    committed when it returns, before the result is stored and the message acknowledged, and rolled back on every
    other way out.
    """

    abstract = True

    def __new__(cls, *args: Any, **kwargs: Any) -> PooledTask:
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
                value.registry.check_name(value, f"{cls.__name__}.{name}")

    @classmethod
    def bind(cls, app: Celery) -> Any:
        """Bind the task to ``app`` as Celery does, and the resources of the class to it.

        Raises:
            ConfigurationError: A ``workerpools_`` setting of the app is unknown or malformed. Raised here, it keeps a
                worker from starting, where a signal's receiver could only log it.
        """
        bound = super().bind(app)
        read_settings(app.conf)
        for name, resource in _resources(cls):
            if isinstance(resource, ConfiguredResource):
                resource.resource_for(app, name)
            elif isinstance(resource.registry, WorkerPools) and not resource.registry.has_app:
                # Celery registers a task with every app of the process: an app that was chosen stays the only one.
                resource.registry.init_app(app)
        return bound


def _resources(cls: type) -> Iterator[tuple[str, Resource[Any] | ConfiguredResource[Any]]]:
    for base in cls.__mro__:
        for name, value in vars(base).items():
            if isinstance(value, (Resource, ConfiguredResource)):
                yield name, value


def _check_attribute(cls: type, name: str) -> None:
    if hasattr(Task, name):
        raise ConfigurationError(
            f"{cls.__name__}.{name}: Celery's Task has an attribute {name!r}, which the resource would hide; "
            "choose another attribute name"
        )


def _in_attempts(task: PooledTask) -> Any:
    cls = type(task)

    @functools.wraps(task.run)
    def run_in_attempts(*args: Any, **kwargs: Any) -> Any:
        # Looked up at each call: Celery's task_annotations may replace the class's run after the task was made.
        original = _bound_run(task, cls)
        request: Any = cast(Any, task).request_stack.top
        return run(
            lambda: original(*args, **kwargs),
            request=request,
            called_directly=request is None or request.called_directly,
            on_replay=functools.partial(_replayed, task),
        )

    return run_in_attempts


def _bound_run(task: PooledTask, cls: type) -> Any:
    for base in cls.__mro__:
        if "run" in vars(base):
            return vars(base)["run"].__get__(task, cls)
    raise NotImplementedError("Tasks must define the run method.")


def _replayed(task: PooledTask, stale: Stale) -> None:
    detail = f"task={task.name} error={type(stale.error).__name__}"
    stale.listeners.emit(EventKind.ATTEMPT_REPLAYED, stale.resource, detail)
