"""How a worker's children find the shared memory that their parent reads (see :mod:`workerpools._stats.memory`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import billiard

from workerpools._celery.lifecycle import execution_pool

if TYPE_CHECKING:
    from workerpools._stats.memory import Board

__all__ = ["child_index", "children", "found_board", "new_board", "unharmed", "withdraw"]

logger = logging.getLogger("workerpools")

# It fills its own namespace when it is imported, where no type checker looks.
_billiard: Any = billiard

# Not WORKERPOOLS_…: those are settings.
_VARIABLE = "_WORKERPOOLS_BOARD_"


@contextmanager
def unharmed() -> Generator[None, None, None]:
    """Log what goes wrong in the block, and go on: tasks run all the same, whether they are seen or not."""
    try:
        yield
    except Exception:
        logger.warning("the statistics of this worker are not complete", exc_info=True)


def new_board(worker: Any, number: int) -> Board | None:
    """Return shared memory for the children of ``worker``; None if it has none.

    Args:
        worker: The sender of ``worker_init``.
        number: Which WorkerPools of its process it is for: a spawned child finds it by that.
    """
    if execution_pool(worker).kind != "prefork":
        return None
    from workerpools._stats.memory import Board

    if _forks(worker):
        return Board.anonymous()
    board = Board.in_file()
    os.environ[f"{_VARIABLE}{number}"] = board.path
    return board


def _forks(worker: Any) -> bool:
    # An option of Celery 5.7; before, the platform's default was taken.
    method = getattr(worker, "pool_start_method", None) or _billiard.get_start_method()
    return bool(method == "fork")


def found_board(number: int) -> Board | None:
    """Return the shared memory that the parent of this spawned child has made; None if there is none."""
    path = os.environ.get(f"{_VARIABLE}{number}")
    if not path:
        return None
    try:
        from workerpools._stats.memory import Board

        return Board.at(path)
    except (OSError, ValueError) as error:
        logger.warning("the parent's shared memory cannot be opened, this process is not seen: %s", error)
        return None


def withdraw(number: int) -> None:
    """Have processes that are started from now on find nothing."""
    os.environ.pop(f"{_VARIABLE}{number}", None)


def child_index() -> int | None:
    """Return this process's place among its parent's children; None if it is no child of an execution pool."""
    index = getattr(_billiard.current_process(), "index", None)
    return index if isinstance(index, int) else None


def children(worker: Any) -> list[int] | None:
    """Return the process ids of the living children of ``worker``; None where they are not known."""
    try:
        found = worker.pool.info.get("processes")
    except Exception:  # the execution pool has not started yet, or is one of somebody else's
        return None
    # One that is just being started has no id yet, for who asks from another thread.
    return [int(pid) for pid in found if pid is not None] if isinstance(found, (list, tuple)) else None
