"""Hands a worker's children the shared memory that their parent reads (see :mod:`workerpools._stats.memory`)."""

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

# billiard fills its namespace at import time, invisible to type checkers.
_billiard: Any = billiard

# Not WORKERPOOLS_…, the prefix of settings.
_VARIABLE = "_WORKERPOOLS_BOARD_"


@contextmanager
def unharmed() -> Generator[None, None, None]:
    """Log an exception of the block and carry on: tasks run with or without statistics."""
    try:
        yield
    except Exception:
        logger.warning("the statistics of this worker are incomplete", exc_info=True)


def new_board(worker: Any, number: int) -> Board | None:
    """Return shared memory for the children of ``worker``; None if it has no children.

    Args:
        worker: The sender of ``worker_init``.
        number: The WorkerPools' number in this process, by which a spawned child finds its shared memory.
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
    # An option since Celery 5.7; earlier versions use the platform's default.
    method = getattr(worker, "pool_start_method", None) or _billiard.get_start_method()
    return bool(method == "fork")


def found_board(number: int) -> Board | None:
    """Return the shared memory created by the parent of this spawned child; None if there is none."""
    path = os.environ.get(f"{_VARIABLE}{number}")
    if not path:
        return None
    try:
        from workerpools._stats.memory import Board

        return Board.at(path)
    except (OSError, ValueError) as error:
        logger.warning("cannot open the parent's shared memory; this process publishes no statistics: %s", error)
        return None


def withdraw(number: int) -> None:
    """Hide the shared memory from processes started from now on."""
    os.environ.pop(f"{_VARIABLE}{number}", None)


def child_index() -> int | None:
    """Return this process's index among its parent's children; None outside an execution pool's child."""
    index = getattr(_billiard.current_process(), "index", None)
    return index if isinstance(index, int) else None


def children(worker: Any) -> list[int] | None:
    """Return the process ids of the living children of ``worker``; None if unknown."""
    try:
        found = worker.pool.info.get("processes")
    except Exception:  # the execution pool has not started yet, or is a third-party one
        return None
    # Seen from another thread, a child that is being started has no id yet.
    return [int(pid) for pid in found if pid is not None] if isinstance(found, (list, tuple)) else None
