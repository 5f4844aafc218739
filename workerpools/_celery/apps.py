"""Which WorkerPools serve which app: known here, so that a worker and the command line need not know the class."""

from __future__ import annotations

import weakref
from typing import Any

__all__ = ["add", "all_of", "of_namesake"]

# The values are strong and hold their app weakly: a WorkerPools lives as long as its app.
_pools_by_app: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


def add(app: Any, pools: Any) -> None:
    """Note that ``pools`` serves ``app``."""
    _pools_by_app.setdefault(app, []).append(pools)


def all_of(app: Any) -> list[Any]:
    """Return every WorkerPools of ``app``, the first one first."""
    return list(_pools_by_app.get(app, ()))


def of_namesake(app: Any) -> list[Any]:
    """Return every WorkerPools of another app that has the name of ``app``, the first one first."""
    if app.main is None:
        return []
    return next((list(found) for other, found in list(_pools_by_app.items()) if other.main == app.main), [])
