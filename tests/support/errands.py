"""Runs a task in a thread of its own while the test's thread breaks things.

Servers must be started and stopped by the main thread: the kernel would end them with any other one.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

_SECONDS = 40.0


class Errands:
    """Carries out, in the thread that calls `run`, what the task's thread and the proxy's ask for."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[Callable[[], object], Future[object]]] = queue.SimpleQueue()
        self._meanwhile: list[Callable[[], object]] = []

    def ask(self, action: Callable[[], object]) -> None:
        """Have `action` carried out, and wait for it; for any thread but that of `run`."""
        done: Future[object] = Future()
        self._asked.put((action, done))
        done.result(_SECONDS)

    def tell(self, action: Callable[[], object]) -> None:
        """Have `action` carried out, and go on."""
        self._asked.put((action, Future()))

    def meanwhile(self, action: Callable[[], object]) -> None:
        """Have `action` carried out once, right after the next `run` has begun."""
        self._meanwhile.append(action)

    def run(self, work: Callable[[], object]) -> None:
        """Run `work` in a thread, and return when it has ended; its exception is raised here."""
        result: Future[object] = Future()

        def call() -> None:
            try:
                result.set_result(work())
            except BaseException as error:
                result.set_exception(error)

        thread = threading.Thread(target=call, name="task", daemon=True)
        thread.start()
        deadline = time.monotonic() + _SECONDS
        while self._meanwhile:
            self._meanwhile.pop(0)()
        while thread.is_alive():
            try:
                action, done = self._asked.get(timeout=0.01)
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise TimeoutError("the task has not ended") from None
                continue
            try:
                done.set_result(action())
            except BaseException as error:
                done.set_exception(error)
        result.result()
