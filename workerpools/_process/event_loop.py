"""The process's event loop, in a thread of its own: started by the first coroutine, after the fork, and ended in order.

One loop for all coroutines of the process, so that a client's connections serve every one of them. The calling thread
waits. In an asynchronous web server the server's loop serves instead. A forked child has no loop until it needs one,
and never touches the descriptors of its parent's.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import sys
import threading
import time
from _thread import allocate_lock
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING, Any

from workerpools._process import fork
from workerpools._process.flows import loop_thread
from workerpools._process.greenlets import library
from workerpools.errors import ConfigurationError

if TYPE_CHECKING:
    import asyncio

__all__ = ["Call", "adopted", "call", "end", "is_here", "is_running", "running", "start"]

logger = logging.getLogger("workerpools")

#: How long what is cancelled may take to clean up, in seconds.
CLEANUP = 5.0

_call: ContextVar[Call | None] = ContextVar("workerpools_call", default=None)


class Call:
    """A coroutine on the loop, and the thread that waits for it.

    Args:
        awaitable: The coroutine, or anything else to await.
        begin: Called before it, in its context and on the loop; None for nothing.
        over: Called with the call at its end, on the loop; None for nothing.

    Attributes:
        result: What it returned.
        error: What it raised; None if it returned.
        cancelled: Whether the waiting thread has cancelled it.
        over: Whether it has ended, with all tasks that it started.
    """

    def __init__(
        self,
        awaitable: Awaitable[Any],
        begin: Callable[[], object] | None = None,
        over: Callable[[Call], object] | None = None,
    ) -> None:
        self._awaitable = awaitable
        self._begin = begin
        self._over = over
        self._task: asyncio.Task[None] | None = None
        self._done = allocate_lock()
        self._done.acquire()
        #: The tasks that it has started, itself or through others, until they have ended.
        self.tasks: set[asyncio.Task[Any]] = set()
        self.result: Any = None
        self.error: BaseException | None = None
        self.cancelled = False
        self.over = False

    def wait(self, timeout: float) -> bool:
        """Wait for the end; return whether it came. One system call, which a signal may interrupt at any point.

        Args:
            timeout: In seconds; -1 for no limit.
        """
        if not self._done.acquire(True, timeout):
            return False
        self._done.release()
        return True

    def start(self) -> None:
        """Start the coroutine, on the loop and in the context of the waiting thread."""
        import asyncio

        if self.cancelled:
            self.close()
            self._release()
            return
        _call.set(self)
        if self._begin is not None:
            self._begin()
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(self._end_tasks, context=contextvars.Context())

    async def _run(self) -> None:
        try:
            self.result = await self._awaitable
        except BaseException as error:
            # SystemExit, too, would end the loop itself.
            self.error = error

    def close(self) -> None:
        """Close a coroutine that was never started."""
        close: Callable[[], object] | None = getattr(self._awaitable, "close", None)
        if close is not None:
            close()

    def cancel(self) -> None:
        """Cancel the coroutine, on the loop."""
        if self._task is not None:
            self._task.cancel()

    def _end_tasks(self, _: Any) -> None:
        import asyncio

        left = self.living()
        if not left:
            self._release()
            return
        waiting = asyncio.get_running_loop().create_task(_end(left))
        waiting.add_done_callback(lambda _: self._release())

    def _release(self) -> None:
        self.over = True
        # The task's context holds the call: a circle would keep what the coroutine used for the garbage collector.
        self._task = None
        self._done.release()
        if self._over is not None:
            self._over(self)
            if self.error is not None:
                logger.debug("what runs in the background on the event loop failed", exc_info=self.error)

    def living(self) -> list[asyncio.Task[Any]]:
        """Return its tasks that have not ended."""
        return [task for task in self.tasks if not task.done()]


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    import asyncio

    # Those that are cancelled already clean up, and a second cancellation would interrupt that. Before Python 3.11
    # nothing tells: they are given a moment.
    if not hasattr(asyncio.Task, "cancelling"):
        await asyncio.wait(tasks, timeout=0.1)
    for task in tasks:
        if not getattr(task, "cancelling", int)():
            task.cancel()
    await asyncio.wait(tasks, timeout=CLEANUP)


class _Loop:
    """The loop of this process, while it has one."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        loop_thread.ident = 0
        self._selector: Any = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def started(self) -> asyncio.AbstractEventLoop:
        """Return the loop; start it if there is none.

        Raises:
            ConfigurationError: gevent or eventlet has patched this process.
        """
        loop = self.loop
        return self._start() if loop is None else loop

    def _start(self) -> asyncio.AbstractEventLoop:
        which = library()
        if which:
            raise ConfigurationError(
                f"async def does not run under {which}, which replaces the sockets and selectors that asyncio needs; "
                "use the execution pool prefork, threads or solo"
            )
        import asyncio
        import selectors

        with self._lock:
            if self.loop is not None:
                return self.loop
            # Before there is anything to inherit.
            fork.guard(self)
            self._selector = selectors.DefaultSelector()
            loop = asyncio.SelectorEventLoop(self._selector)
            loop.set_task_factory(_create_task)
            thread = threading.Thread(target=self._run, args=(loop,), name="workerpools-loop", daemon=True)
            try:
                # The thread belongs to the process; its tasks tell by their own contexts whose they are.
                contextvars.Context().run(thread.start)
                self._thread, loop_thread.ident = thread, thread.ident or 0
                self.loop = loop
            except BaseException:
                # Interrupted: nobody else knows it.
                loop.call_soon_threadsafe(loop.stop)
                raise
            return loop

    def _run(self, loop: asyncio.SelectorEventLoop) -> None:
        import asyncio

        asyncio.set_event_loop(loop)
        while not loop.is_closed():
            try:
                loop.run_forever()
            except BaseException:
                # SystemExit of a task that nobody awaits passes through the loop.
                logger.exception("a task raised this through the event loop, which goes on")
                continue
            break

    @contextlib.contextmanager
    def adopted(self) -> Generator[None]:
        """Inside, the loop that runs in the calling thread is the process's."""
        import asyncio

        loop = asyncio.get_running_loop()
        with self._lock:
            outermost = self.loop is not loop
            if outermost:
                if self.loop is not None:
                    raise ConfigurationError(
                        "this process runs another event loop already, for an asynchronous client that was used before "
                        "the server's start: use none at import"
                    )
                fork.guard(self)
                loop_thread.ident, self.loop = threading.get_ident(), loop
        factory = loop.get_task_factory()
        if factory is None:
            loop.set_task_factory(_create_task)
        try:
            yield
        finally:
            if factory is None:
                loop.set_task_factory(None)
            if outermost:
                self.loop, loop_thread.ident = None, 0

    def end(self, timeout: float) -> None:
        """End the loop in order, if it is of our own: tasks are cancelled and awaited, then it is closed.

        Args:
            timeout: The longest wait, in seconds.
        """
        with self._lock:
            loop, thread = self.loop, self._thread
            if loop is None or thread is None or is_here():
                return
            until = time.monotonic() + timeout
            if not (_wait(Call(_wind_up(timeout)), loop, timeout)):
                logger.warning("the event loop did not end within %.1f s; it ends with the process", timeout)
                return
            self.loop = None
            loop.call_soon_threadsafe(loop.stop)
            thread.join(max(0.1, until - time.monotonic()))
            if not thread.is_alive():
                loop.close()
            loop_thread.ident, self._thread = 0, None

    def pin(self) -> object:
        """Return what a forked child must not finalize."""
        return self.loop, self._selector

    def discard(self) -> tuple[object, Sequence[int]]:
        """Forget the parent's loop in a forked child; see :mod:`workerpools._process.fork`."""
        loop, selector, adopted = self.loop, self._selector, self._thread is None
        self._forget()
        if loop is None or adopted:
            return loop, ()
        # The child shares the parent's epoll instance: what it registered or removed there would be the parent's.
        with contextlib.suppress(Exception):
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(null, selector.fileno(), inheritable=False)
            os.close(null)
        pipe = [getattr(loop, name, None) for name in ("_ssock", "_csock")]
        return (loop, selector, pipe), [end.fileno() for end in pipe if end is not None]


running = _Loop()


def _create_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    import asyncio

    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
    context: contextvars.Context | None = options.get("context")
    whose = _call.get() if context is None else context.get(_call)
    if whose is not None:
        # No weak references: a signal that strikes in the callback of one would be lost.
        whose.tasks.add(task)
        task.add_done_callback(whose.tasks.discard)
    return task


async def _wind_up(timeout: float) -> None:
    import asyncio

    loop, own = asyncio.get_running_loop(), asyncio.current_task()
    left = [task for task in asyncio.all_tasks() if task is not own]
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=timeout)
    await loop.shutdown_asyncgens()


_RLock: Any = type(threading.RLock())


def _let_others_log() -> None:
    """Release what a signal has left locked of logging in the calling thread: the loop's would wait for it for ever.

    Until Python 3.12 logging takes its locks in Python functions, and a handler that raises may strike before these
    return. The locks are re-entrant, so that the thread itself never notices.
    """
    module: Any = logging
    # dictConfig() empties the list; the root's handlers may be older.
    handlers = [*[reference() for reference in module._handlerList], *logging.root.handlers]
    locks: list[Any] = [module._lock, *[handler.lock for handler in handlers if handler is not None]]
    held = [lock for lock in locks if isinstance(lock, _RLock) and lock._is_owned()]
    if not held:
        return
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "logging":
            # In use: this is a handler that waits for a coroutine.
            return
        frame = frame.f_back
    for lock in held:
        while lock._is_owned():
            lock.release()


def _wait(waiting: Call, loop: asyncio.AbstractEventLoop, timeout: float) -> bool:
    if sys.version_info < (3, 13):
        _let_others_log()
    loop.call_soon_threadsafe(waiting.start, context=contextvars.copy_context())
    return waiting.wait(timeout)


def call(waiting: Call, timeout: float = -1) -> bool:
    """Run a coroutine on the loop, in the calling context, and wait for its end.

    Whatever ends the wait before, a signal or the timeout, cancels the coroutine and waits for its clean-up, at most
    :data:`CLEANUP` seconds.

    Args:
        waiting: The coroutine.
        timeout: In seconds; -1 for no limit.

    Returns:
        Whether it ended in time.

    Raises:
        ConfigurationError: gevent or eventlet has patched this process.
        BaseException: What interrupted the wait.
    """
    try:
        if _wait(waiting, running.started(), timeout):
            return True
        _cancel(waiting)
        return False
    except BaseException:
        try:
            _cancel(waiting)
        except BaseException:
            # Another signal: an exit after a soft time limit, say.
            _cancel(waiting)
            raise
        raise


def _cancel(waiting: Call) -> None:
    waiting.cancelled = True
    loop = running.loop
    if waiting.over:
        return
    if loop is None:
        waiting.close()
        return
    loop.call_soon_threadsafe(waiting.cancel)
    if not waiting.wait(CLEANUP):
        logger.warning("a coroutine did not end within %.1f s after it was cancelled", CLEANUP)


_started: set[Call] = set()


def start(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Start a coroutine that belongs to no attempt, without waiting; nothing is done in a process without a loop.

    Args:
        coroutine: The coroutine.
    """
    loop, begun = running.loop, Call(coroutine, over=_started.discard)
    if loop is None:
        begun.close()
        return
    _started.add(begun)
    loop.call_soon_threadsafe(begun.start, context=contextvars.Context())


def adopted() -> contextlib.AbstractContextManager[None]:
    """Make the loop that runs in the calling thread the process's, inside the block.

    Raises:
        ConfigurationError: The process has another one already.
        RuntimeError: No loop runs in the calling thread.
    """
    return running.adopted()


def is_here() -> bool:
    """Return whether the calling thread runs the loop."""
    return loop_thread.ident == threading.get_ident()


def is_running() -> bool:
    """Return whether this process has a loop."""
    return running.loop is not None


def end(timeout: float) -> None:
    """End the loop in order, if this process has one. The next coroutine starts another.

    Args:
        timeout: The longest wait, in seconds.
    """
    running.end(timeout)
