"""Which of Celery's signals tells a WorkerPools what.

Signals only make things earlier: what must hold (a value a process, nothing across a fork) holds without them.
Receivers are strong, each with a dispatch_uid of its own, take any keyword, look at no sender, and never raise:
Celery would log the error and go on without it.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import signals

from workerpools._pools.shared import UNKNOWN, ExecutionPool

if TYPE_CHECKING:
    from workerpools._celery.pools import WorkerPools

__all__ = ["connect", "execution_pool", "keep_limits", "worker_limits"]

logger = logging.getLogger("workerpools")

_numbers = itertools.count(1)


def connect(pools: WorkerPools) -> int:
    """Have ``pools`` told what its process and its worker do, for as long as it lives.

    Returns:
        Its number among those of the process.
    """
    number = next(_numbers)
    ref = weakref.ref(pools)
    receivers: tuple[tuple[Any, Callable[[WorkerPools, Any], object]], ...] = (
        (signals.worker_init, lambda told, sender: told.worker_starts(sender)),
        (signals.worker_process_init, lambda told, sender: told.process_starts()),
        (signals.worker_process_shutdown, lambda told, sender: told.close()),
        (signals.worker_shutting_down, lambda told, sender: told.worker_stops()),
        (signals.worker_shutdown, lambda told, sender: told.worker_ended(sender)),
    )
    undo: list[Callable[[], object]] = []
    for signal, tell in receivers:
        uid = f"workerpools-{number}-{signal.name}"
        signal.connect(_receiver(ref, tell), weak=False, dispatch_uid=uid)
        undo.append(_disconnection(signal, uid))

    def at_exit() -> None:
        if (told := ref()) is not None:
            told.close()

    # A worker that is stopped cold, a script and a web process send no signal.
    atexit.register(at_exit)
    undo.append(lambda: atexit.unregister(at_exit))
    weakref.finalize(pools, _call_all, undo).atexit = False
    return number


def _receiver(ref: weakref.ref[WorkerPools], tell: Callable[[WorkerPools, Any], object]) -> Callable[..., None]:
    def receive(sender: Any = None, **_: Any) -> None:
        pools = ref()
        if pools is None:
            return
        try:
            tell(pools, sender)
        except Exception as error:
            pools.record_failure(error)
            logger.exception("workerpools could not follow the worker's life cycle; tasks will raise this error")

    return receive


def _disconnection(signal: Any, uid: str) -> Callable[[], object]:
    return lambda: signal.disconnect(dispatch_uid=uid)


def _call_all(functions: list[Callable[[], object]]) -> None:
    for function in functions:
        function()


def execution_pool(worker: Any) -> ExecutionPool:
    """Return what runs the tasks of ``worker`` in each of its processes.

    Args:
        worker: The sender of ``worker_init``, a ``celery.worker.WorkController``.
    """
    from celery.concurrency import get_implementation

    cls = worker.pool_cls
    if isinstance(cls, str):
        cls = get_implementation(cls)
    kind = next((_KINDS[base.__module__] for base in cls.__mro__ if base.__module__ in _KINDS), "")
    if kind in ("prefork", "solo"):
        return ExecutionPool(kind, 1)
    if not kind:
        return UNKNOWN
    # With --autoscale the concurrency grows later, when the connection pools have their size already.
    sizes = [size for size in (worker.concurrency, getattr(worker, "max_concurrency", None)) if isinstance(size, int)]
    return ExecutionPool(kind, max(sizes, default=None))


# By app, which is held weakly: a task knows its app, and not its worker.
_limits: weakref.WeakKeyDictionary[Any, tuple[float | None, float | None]] = weakref.WeakKeyDictionary()


def keep_limits(worker: Any) -> None:
    """Keep the hard and soft time limits of ``worker``'s command line and configuration; a fork inherits them."""
    app = getattr(worker, "app", None)
    if app is not None:
        _limits[app] = (getattr(worker, "time_limit", None), getattr(worker, "soft_time_limit", None))


def worker_limits(app: Any) -> tuple[float | None, float | None]:
    """Return the hard and soft time limits, in seconds, of the app's worker in this process; those of its settings
    where no worker was seen: a spawned child does not see its parent's command line.
    """
    found = _limits.get(app)
    return (app.conf.task_time_limit, app.conf.task_soft_time_limit) if found is None else found


_KINDS = {
    "celery.concurrency.prefork": "prefork",
    "celery.concurrency.solo": "solo",
    "celery.concurrency.thread": "threads",
    "celery.concurrency.gevent": "gevent",
    "celery.concurrency.eventlet": "eventlet",
}
