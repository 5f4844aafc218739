"""Celery's current task and request on the event loop: those of the body that runs, not of the loop's thread.

Celery keeps both on stacks, one per thread. In the loop's thread their content is that of the context, so that
``self.request``, ``self.retry()`` and what a message tells of its parent hold in every coroutine of a body.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from celery import _state

from workerpools._run import coroutines

__all__ = ["follow"]


class _InContext:
    """A stack with a content of its own in each context. It has the methods that Celery uses of a list."""

    def __init__(self) -> None:
        self._content: ContextVar[tuple[Any, ...]] = ContextVar("workerpools_stack", default=())

    def fill(self, content: tuple[Any, ...]) -> None:
        """Set the content in the current context."""
        self._content.set(content)

    def append(self, item: Any) -> None:
        """Push an item."""
        self._content.set((*self._content.get(), item))

    def pop(self) -> Any:
        """Remove and return the topmost item."""
        content = self._content.get()
        self._content.set(content[:-1])
        return content[-1]

    def __getitem__(self, index: int) -> Any:
        return self._content.get()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._content.get())

    def __len__(self) -> int:
        return len(self._content.get())


_stacks: weakref.WeakKeyDictionary[Any, _InContext] = weakref.WeakKeyDictionary()


def follow() -> None:
    """Carry the current task and request to the event loop from now on. Idempotent."""
    coroutines.carry = _carry


def _carry() -> Callable[[], object]:
    """Return a function that makes the calling thread's tasks and requests those of the context it is called in."""
    tasks: Any = _state._task_stack
    here = tuple(tasks.stack)
    stacks = [(tasks, here)]
    for task in dict.fromkeys(here):
        stacks.append((task.request_stack, tuple(task.request_stack.stack)))

    def begin() -> None:
        for stack, content in stacks:
            found = _stacks.get(stack)
            if found is None:
                found = _stacks[stack] = _InContext()
            # Of this thread alone. Both of Celery's kinds of stacks.
            local = getattr(stack, "_local", stack)
            local.stack = found
            if local is stack:
                stack.push, stack.pop = found.append, found.pop
            found.fill(content)

    return begin
