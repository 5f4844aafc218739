"""Tells each living WorkerPools what its process and its worker do, as Celery's signals report it.

Signals only make things earlier: one value per process, and none across a fork, hold without them.

Receivers are connected once per process and stay connected; they walk the objects that are alive. So nothing has to be
disconnected when one is collected: the collector can run inside any call, even one that holds the lock of a signal.

Any object will do that has ``worker_starts(worker)``, ``process_starts()``, ``worker_stops()``,
``worker_ended(worker)`` and ``close()``, and ``record_failure(error)`` for an exception that one of these raised.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import weakref
from collections.abc import Callable
from typing import Any

from celery import signals

from workerpools._pools.shared import UNKNOWN, ExecutionPool

__all__ = ["connect", "execution_pool", "keep_limits", "worker_limits"]

logger = logging.getLogger("workerpools")

_numbers = itertools.count(1)

# By number, and so in order of creation. A table without a lock: see above.
_living: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

_connected = False


def connect(pools: Any) -> int:
    """Have ``pools`` told what its process and its worker do, for as long as it lives.

    Returns:
        Its number among those of the process.
    """
    global _connected
    number = next(_numbers)
    _living[number] = pools
    if not _connected:
        for signal, tell in _FOLLOWED:
            # The dispatch_uid keeps it to one, should two threads come here together.
            signal.connect(_receiver(tell), weak=False, dispatch_uid=f"workerpools-{signal.name}")
        # A worker that is stopped cold, a script and a web process send no signal.
        atexit.unregister(_at_exit)
        atexit.register(_at_exit)
        _connected = True
    return number


def _receiver(tell: Callable[[Any, Any], object]) -> Callable[..., None]:
    def receive(sender: Any = None, **_: Any) -> None:
        for ref in _living.valuerefs():
            pools = ref()
            if pools is None:
                continue
            try:
                tell(pools, sender)
            except Exception as error:
                # Celery would log it and go on without it; the others are told all the same.
                pools.record_failure(error)
                logger.exception("workerpools could not follow the worker's life cycle; tasks will raise this error")

    return receive


_FOLLOWED: tuple[tuple[Any, Callable[[Any, Any], object]], ...] = (
    (signals.worker_init, lambda pools, worker: pools.worker_starts(worker)),
    (signals.worker_process_init, lambda pools, sender: pools.process_starts()),
    (signals.worker_process_shutdown, lambda pools, sender: pools.close()),
    (signals.worker_shutting_down, lambda pools, sender: pools.worker_stops()),
    (signals.worker_shutdown, lambda pools, worker: pools.worker_ended(worker)),
)

_at_exit = _receiver(lambda pools, sender: pools.close())


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
