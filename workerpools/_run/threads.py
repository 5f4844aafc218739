"""Threads that may still work for a failed attempt: nothing runs again while one of them lives.

Python does not tell which thread started another one, so each thread is noted when it starts. gevent's greenlets know
who spawned them. The worker of a pool may have been started by anyone: it counts while there is work for it.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

from workerpools._run.attempts import Attempt, current, line, running

__all__ = ["PREFIX", "Living", "follow", "may_act", "of_no_attempt", "starting", "working"]

#: The names of this package's own threads begin with it.
PREFIX = "workerpools-"

_ATTRIBUTE = "__workerpools__"

_of_no_attempt: ContextVar[bool] = ContextVar("workerpools_of_no_attempt", default=False)


class Living(NamedTuple):
    """What is known of a thread that is alive after an attempt has failed.

    Attributes:
        name: Its name.
        started: Whether the attempt may have started it, itself or through other threads.
        own: Whether it is this package's, or runs another task.
        busy: Whether it is the worker of a pool that has work, or for which work is waiting; None if it is no such
            worker.
    """

    name: str
    started: bool = False
    own: bool = False
    busy: bool | None = None


def may_act(thread: Living) -> bool:
    """Return whether a thread may still do something for the attempt.

    Args:
        thread: The thread.
    """
    if thread.own:
        return False
    return thread.started if thread.busy is None else thread.busy


def follow() -> None:
    """Note from now on which attempts start a thread. Idempotent.

    It is the only change that this package makes to the standard library: without it, a thread of a test's own server
    or of another task could not be told from one of the body.
    """
    start: Callable[..., None] = threading.Thread.start
    if hasattr(start, _ATTRIBUTE):
        return

    # A tool that wraps it in the same way copies the mark.
    @functools.wraps(start)
    def noted(thread: threading.Thread, *arguments: Any, **options: Any) -> None:
        setattr(thread, _ATTRIBUTE, [weakref.ref(attempt) for attempt in starting()])
        start(thread, *arguments, **options)

    setattr(noted, _ATTRIBUTE, True)
    threading.Thread.start = noted  # type: ignore[method-assign, assignment]


@contextmanager
def of_no_attempt() -> Generator[None, None, None]:
    """Have the threads that are started in the block belong to no attempt."""
    token = _of_no_attempt.set(True)
    try:
        yield
    finally:
        _of_no_attempt.reset(token)


def starting() -> list[Attempt]:
    """Return the attempts that the calling code runs in, or that may have started its thread."""
    if _of_no_attempt.get():
        return []
    attempt = current()
    if attempt is not None:
        return line(attempt)
    alive = running()
    if not alive:
        return []
    worker = _Worker.of(sys._getframe())
    if worker is not None:
        return [] if worker.is_task_system else alive
    return _noted(threading.current_thread())


def _noted(thread: threading.Thread) -> list[Attempt]:
    refs: list[weakref.ref[Attempt]] = getattr(thread, _ATTRIBUTE, [])
    return [attempt for ref in refs if (attempt := ref()) is not None]


def working(attempt: Attempt) -> list[str]:
    """Return the names of the threads, greenlets and tasks of the event loop that may still work for an attempt.

    Args:
        attempt: The attempt, which ran in the calling thread or greenlet.
    """
    gevent = sys.modules.get("gevent.monkey")
    patched = gevent is not None and gevent.is_module_patched("threading")
    found = list(_greenlets(attempt) if patched else _threads(attempt))
    names = [thread.name for thread in found if may_act(thread)]
    if not names and False in [thread.busy for thread in found]:
        # A worker has taken its work from the queue a moment before it is to be seen in one of its variables.
        names = _taken()
    return names + [repr(task.get_name()) for task in attempt.left_tasks if not task.done()]


def _taken() -> list[str]:
    """Return the names of the functions that the workers of executors have not finished."""
    kind: Any = sys.modules.get("concurrent.futures.thread")
    items: list[Any] = [] if kind is None else [each for each in gc.get_objects() if type(each) is kind._WorkItem]
    functions = [_function(each) for each in items if not each.future.done()]
    return [repr(getattr(each, "__qualname__", type(each).__name__)) for each in functions if not _of_celery(each)]


def _threads(attempt: Attempt) -> Iterator[Living]:
    current_thread, frames = threading.current_thread(), _frames()
    pool = _Worker.of(sys._getframe())
    for thread in threading.enumerate():
        if thread is not current_thread:
            worker = _Worker.of(frames.get(thread.ident or 0))
            own = thread.name.startswith(PREFIX) or (worker is not None and worker.runs_tasks(pool))
            yield Living(repr(thread.name), attempt in _noted(thread), own, None if worker is None else worker.is_busy)


def _frames() -> dict[int, FrameType]:
    # While CPython 3.11 lists the frames it holds a lock that starting and ending threads wait for, and a garbage
    # collection in between may switch to one of these: both wait for ever (python/cpython#106883).
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        if collects:
            gc.enable()


def _greenlets(attempt: Attempt) -> Iterator[Living]:
    gevent: Any = sys.modules["gevent"]
    current_greenlet = gevent.getcurrent()
    pool = _Worker.of(sys._getframe())
    # gevent keeps no list. By type: isinstance() would evaluate lazy proxies.
    for greenlet in [each for each in gc.get_objects() if issubclass(type(each), gevent.Greenlet)]:
        if greenlet is current_greenlet or greenlet.dead:
            continue
        function = getattr(greenlet, "_run", None)
        thread = getattr(function, "__self__", None)
        if isinstance(thread, threading.Thread):
            name, started = thread.name, attempt in _noted(thread)
        else:
            name = getattr(function, "__qualname__", type(function).__name__)
            started = _descends(greenlet, current_greenlet)
        worker = _Worker.of(greenlet.gr_frame)
        own = name.startswith(PREFIX) or (worker is not None and worker.runs_tasks(pool))
        yield Living(repr(name), started, own, None if worker is None else worker.is_busy)


def _descends(greenlet: Any, ancestor: object) -> bool:
    while greenlet is not None:
        # A main greenlet has no such attribute.
        spawner = getattr(greenlet, "spawning_greenlet", None)
        greenlet = None if spawner is None else spawner()
        if greenlet is ancestor:
            return True
    return False


#: The functions in which the threads of the standard library's pools run, with their local variables for the work and
#: for the queue. A Pool's handler and a ProcessPoolExecutor's manager know all the work that was handed over.
_WORKERS = {
    ("concurrent.futures.thread", "_worker"): ("work_item", "work_queue"),
    ("concurrent.futures.process", "run"): ("self", ""),
    ("multiprocessing.pool", "worker"): ("task", ""),
    ("multiprocessing.pool", "_handle_tasks"): ("cache", "taskqueue"),
}


class _Worker(NamedTuple):
    """A thread of a pool.

    Attributes:
        work: What it is doing, or the work of the whole pool; None if it waits.
        queue: The queue that it takes its work from; None if it has not begun, or has none of its own.
    """

    work: Any
    queue: Any

    @classmethod
    def of(cls, frame: FrameType | None) -> _Worker | None:
        """Return the pool's thread whose stack ends in ``frame``; None if it is none."""
        found = None
        while frame is not None:
            names = _WORKERS.get((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
            if names is not None:
                variables: Any = frame.f_locals
                found = cls(*[variables.get(name) for name in names])
                if isinstance(variables, dict):
                    # Until Python 3.12 a copy, which the frame keeps, with all that it refers to.
                    variables.clear()
            frame = frame.f_back
        return found

    @property
    def is_busy(self) -> bool:
        """Whether it has work, or work is waiting for it."""
        # By its own key as soon as it is handed over, until it is done.
        work = getattr(self.work, "pending_work_items", self.work)
        busy = not all(map(_is_done, list(work.values()))) if isinstance(work, dict) else work is not None
        return busy or (self.queue is not None and not self.queue.empty())

    @property
    def is_task_system(self) -> bool:
        """Whether it runs a task."""
        return _of_celery(_function(self.work))

    def runs_tasks(self, pool: _Worker | None) -> bool:
        """Whether it runs a task, or is to run the next one.

        Args:
            pool: The worker in whose thread the attempt ran; None if it was no worker.
        """
        return self.is_task_system or (pool is not None and pool.is_task_system and self.queue is pool.queue)


def _is_done(work: Any) -> bool:
    """Return whether a work item of an executor, or a result of a Pool, needs no more work."""
    if hasattr(work, "future"):
        return bool(work.future.done())
    return hasattr(work, "ready") and bool(work.ready())


def _function(item: Any) -> Any:
    """Return the function that an executor's work item calls."""
    # Since Python 3.14 it is kept with its arguments.
    return getattr(item, "fn", None) or next(iter(getattr(item, "task", ())), None)


def _of_celery(function: Any) -> bool:
    # By name: the core imports no Celery.
    return str(getattr(function, "__module__", "")).partition(".")[0] == "celery"
