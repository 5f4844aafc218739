"""The messages of task bodies: each is an effect of the attempt that sends it, or waits for its commit."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from celery import Celery, current_task, signals
from celery.utils import uuid
from kombu import serialization

from workerpools._run import attempts
from workerpools._run.attempts import Attempt, Effect, note_effect
from workerpools._run.on_commit import attempt_here, on_commit

__all__ = ["PUBLISH", "at_once", "call_on_commit", "check", "follow", "has_left", "hold", "send_on_commit"]

#: The values of a task's option ``publish``.
PUBLISH = ("at_once", "on_commit")

_ATTRIBUTE = "__workerpools__"

_NONE = object()

#: The attempt that holds no messages just now. Bodies that it runs meanwhile have attempts of their own.
_at_once: ContextVar[object] = ContextVar("workerpools_at_once", default=_NONE)


def follow() -> None:
    """Note from now on every task message that a body sends. Idempotent."""
    signals.before_task_publish.connect(_leaves, weak=False, dispatch_uid="workerpools-before_task_publish")
    signals.after_task_publish.connect(_has_left, weak=False, dispatch_uid="workerpools-after_task_publish")


def _leaves(sender: Any = None, **_: Any) -> None:
    # Without an attempt, a thread that runs a task is Celery's: it sends callbacks, the next task of a chain, errbacks,
    # or is in a body of another base. Any other thread may be one of a body.
    if attempts.current() is not None or not current_task:
        note_effect(Effect(f"message {sender!r}"))


#: Whether messages that are waited for have left, by their ids.
_awaited: dict[str, bool] = {}


def has_left(message_id: str, send: Callable[[], object]) -> bool:
    """Call ``send``; return whether it published a message with this id.

    What ``apply_async()`` returns proves nothing: a subclass may drop the message (celery-singleton, a filter).

    Args:
        message_id: The id of the task.
        send: Sends it.
    """
    _awaited[message_id] = False
    try:
        send()
    finally:
        left = _awaited.pop(message_id)
    return left


def _has_left(headers: Any = None, body: Any = None, **_: Any) -> None:
    # In version 1 of the message protocol the id is in the body.
    found = (headers or {}).get("id") or (body.get("id") if isinstance(body, Mapping) else None)
    if found in _awaited:
        _awaited[found] = True


def _attempt() -> Attempt | None:
    """Return the attempt whose commit the calling code waits for; None if there is none."""
    return attempts.current() if current_task else attempt_here()


@contextmanager
def at_once() -> Generator[None, None, None]:
    """Have messages that are sent in the block leave at once, whatever the task's option says."""
    token = _at_once.set(attempts.current())
    try:
        yield
    finally:
        _at_once.reset(token)


def call_on_commit(function: Callable[[], object]) -> None:
    """Call ``function`` once the current attempt is committed; at once if none runs.

    Args:
        function: The function.
    """
    if not on_commit(function, getattr(function, "__qualname__", type(function).__qualname__), _attempt()):
        function()


def send_on_commit(task: Any, args: Any, kwargs: Any, options: Mapping[str, Any]) -> Any:
    """Send a task once the current attempt is committed; at once if none runs.

    ``apply_async()`` itself waits: what a subclass does there, take a lock say, is not done for a message that is
    dropped.

    Args:
        task: The task.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        options: The options of ``apply_async()``.

    Returns:
        The result of the message; of ``apply_async()`` if it was sent.

    Raises:
        TypeError: The task cannot be called with these arguments.
        kombu.exceptions.EncodeError: They cannot be serialized.
    """
    attempt = _attempt()
    if attempt is None:
        return task.apply_async(args, kwargs, **options)
    check(task, args, kwargs, options)
    given = {**options, "task_id": options.get("task_id") or uuid()}
    send = _later(partial(task.apply_async, args, kwargs), given)
    if not on_commit(send, f"message {task.name!r}", attempt):
        return send()
    result: Any = task.AsyncResult(given["task_id"])
    result.ignored = given.get("ignore_result", task.ignore_result)
    return result


def check(task: Any, args: Any, kwargs: Any, options: Mapping[str, Any]) -> None:
    """Check a message that is sent later, while the body can still be told.

    Args:
        task: The task.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        options: The options of ``apply_async()``.

    Raises:
        TypeError: The task cannot be called with these arguments.
        kombu.exceptions.EncodeError: They cannot be serialized.
    """
    if task.typing:
        task.__header__(*(args or ()), **(kwargs or {}))
    # A pydantic task's arguments are models until they are sent.
    if getattr(task, "_dump_pydantic_arguments", None) is None:
        _check_encoding(task.app, args, kwargs, options.get("serializer") or task.serializer)


def hold() -> None:
    """Have bodies of tasks with ``publish="on_commit"`` hold what they send, whoever sends it. Idempotent.

    All of Celery's ways to send a task end in ``Celery.send_task``, which is replaced for that.
    """
    celery: Any = Celery
    send_task = celery.send_task
    if hasattr(send_task, _ATTRIBUTE):
        return
    signature = inspect.signature(send_task)

    # A tool that wraps it in the same way copies the mark.
    @functools.wraps(send_task)
    def held(app: Any, name: str, *arguments: Any, **options: Any) -> Any:
        attempt = _attempt()
        if attempt is None or attempt is _at_once.get() or getattr(attempt.instance, "publish", "") != "on_commit":
            return send_task(app, name, *arguments, **options)
        given = signature.bind(app, name, *arguments, **options).arguments
        given.update(given.pop("options", {}))
        for known in ("self", "name"):
            del given[known]
        given["task_id"] = given.get("task_id") or uuid()
        _check_encoding(app, given.get("args"), given.get("kwargs"), given.get("serializer"))
        send = _later(partial(send_task, app, name), given)
        if not on_commit(send, f"message {name!r}", attempt):
            return send()
        result: Any = (given.get("result_cls") or app.AsyncResult)(given["task_id"])
        result.ignored = given.get("ignore_result")
        return result

    setattr(held, _ATTRIBUTE, True)
    celery.send_task = held


def _later(send: Callable[..., Any], options: Mapping[str, Any]) -> Callable[[], Any]:
    """Return a function that sends a message later, when the body's producer and connection are no longer its own."""
    rest = {key: value for key, value in options.items() if key not in ("producer", "publisher", "connection")}
    connection = options.get("connection")
    # Opens nothing yet.
    own = None if connection is None else connection.clone()

    def sends() -> Any:
        with at_once():
            if own is None:
                return send(**rest)
            with own:
                return send(**rest, connection=own)

    return sends


def _check_encoding(app: Any, args: Any, kwargs: Any, serializer: Any) -> None:
    # In the body, whose transaction a mistake undoes. After the commit there would be nobody to tell.
    dumps: Any = serialization.dumps
    dumps((args or (), kwargs or {}), serializer or app.conf.task_serializer)
