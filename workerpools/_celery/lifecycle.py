"""Forwards Celery's worker and process signals to every living WorkerPools.

Signals only make things happen earlier: one value per process, and none across a fork, hold without them.

Receivers are connected once per process, stay connected, and iterate over the living objects. Nothing is disconnected
when one is garbage-collected: that can happen inside any call, even one that holds a signal's lock.

Objects need ``worker_starts(worker)``, ``process_starts()``, ``worker_stops()``, ``worker_ended(worker)``,
``close()``, and ``record_failure(error)`` for an exception raised by one of these.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable
from typing import Any

from celery import signals

from workerpools._pools.shared import UNKNOWN, ExecutionPool
from workerpools._process import ends, event_loop
from workerpools._run.attempts import last_returned
from workerpools._run.loop import log_failed_after_commit

__all__ = ["connect", "execution_pool", "keep_limits", "worker_limits"]

logger = logging.getLogger("workerpools")

_numbers = itertools.count(1)

# By number, so in order of creation. No lock: see above.
_living: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

_connected = False


def connect(pools: Any) -> int:
    """Forward signals to ``pools`` for as long as it lives.

    Returns:
        Its number in this process, from 1.
    """
    global _connected
    number = next(_numbers)
    _living[number] = pools
    if not _connected:
        for signal, forward in _FOLLOWED:
            # The dispatch_uid prevents a second receiver if two threads get here at once.
            receiver = _receiver(forward, ends=signal.name in _LAST)
            signal.connect(receiver, weak=False, dispatch_uid=f"workerpools-{signal.name}")
        signals.task_failure.connect(_task_failed, weak=False, dispatch_uid="workerpools-task_failure")
        # A cold shutdown, a script, a web process and a child of multiprocessing send no signal.
        ends.at_end(_at_exit)
        _connected = True
    return number


def living() -> list[Any]:
    """Return every ``WorkerPools`` of this process, in order of creation."""
    return [pools for ref in _living.valuerefs() if (pools := ref()) is not None]


def _receiver(forward: Callable[[Any, Any], object], *, ends: bool = False) -> Callable[..., None]:
    def receive(sender: Any = None, **_: Any) -> None:
        for pools in living():
            try:
                forward(pools, sender)
            except Exception as error:
                # Celery would log it and carry on without us. The other objects still get the signal.
                pools.record_failure(error)
                logger.exception("workerpools failed to handle a worker signal; tasks will raise this error")
        if ends:
            # After the clients that live on it.
            event_loop.end(event_loop.CLEANUP)

    return receive


_FOLLOWED: tuple[tuple[Any, Callable[[Any, Any], object]], ...] = (
    (signals.worker_init, lambda pools, worker: pools.worker_starts(worker)),
    (signals.worker_process_init, lambda pools, sender: pools.process_starts()),
    (signals.worker_process_shutdown, lambda pools, sender: pools.close()),
    (signals.worker_shutting_down, lambda pools, sender: pools.worker_stops()),
    (signals.worker_shutdown, lambda pools, worker: pools.worker_ended(worker)),
)

#: The last signals of a process, after which no task runs.
_LAST = ("worker_process_shutdown", "worker_shutdown")

_at_exit = _receiver(lambda pools, sender: pools.close(), ends=True)


def _task_failed(sender: Any = None, exception: Any = None, **_: Any) -> None:
    """Log what stands of a task that fails although its body had returned: its result cannot be encoded, say."""
    attempt = last_returned.get()
    if attempt is None or attempt.instance is not sender:
        return
    last_returned.set(None)
    if effects := attempt.effects:
        log_failed_after_commit(attempt.task, exception, effects)


def execution_pool(worker: Any) -> ExecutionPool:
    """Return the execution pool of ``worker``.

    Args:
        worker: The sender of ``worker_init``, a ``celery.worker.WorkController``.
    """
    from celery.concurrency import get_implementation

    cls = worker.pool_cls
    if isinstance(cls, str):
        cls = get_implementation(cls)
    kind = next((_KINDS[base.__module__] for base in cls.__mro__ if base.__module__ in _KINDS), "")
    if not kind:
        return UNKNOWN
    # With --autoscale the concurrency grows later, after the connection pools were sized.
    sizes = [getattr(worker, name, None) for name in ("concurrency", "max_concurrency")]
    most = max((size for size in sizes if isinstance(size, int)), default=None)
    if kind == "prefork":
        return ExecutionPool(kind, 1, most or 1)
    return ExecutionPool(kind, 1 if kind == "solo" else most)


# By app, held weakly: a task knows its app but not its worker.
_limits: weakref.WeakKeyDictionary[Any, tuple[float | None, float | None]] = weakref.WeakKeyDictionary()


def keep_limits(worker: Any) -> None:
    """Record the hard and soft time limits of ``worker``, from its command line or configuration, for its forks."""
    app = getattr(worker, "app", None)
    if app is not None:
        _limits[app] = (getattr(worker, "time_limit", None), getattr(worker, "soft_time_limit", None))


def worker_limits(app: Any) -> tuple[float | None, float | None]:
    """Return the hard and soft time limits of the app's worker in this process, in seconds.

    Without a worker in this process, those of the app's settings: a spawned child does not see its parent's command
    line.
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
