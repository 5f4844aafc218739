"""The WorkerPools of each app, registered here so that the worker and the command line need not import the class."""

from __future__ import annotations

import weakref
from typing import Any

__all__ = ["add", "all_of", "of_namesake"]

# The values are strong references to objects that hold their app weakly: a WorkerPools lives as long as its app.
_pools_by_app: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


def add(app: Any, pools: Any) -> None:
    """Register ``pools`` for ``app``."""
    _pools_by_app.setdefault(app, []).append(pools)


def all_of(app: Any) -> list[Any]:
    """Return every WorkerPools of ``app``, in order of registration."""
    return list(_pools_by_app.get(app, ()))


def of_namesake(app: Any) -> list[Any]:
    """Return every WorkerPools of another app with the same name as ``app``, in order of registration."""
    if app.main is None:
        return []
    return next((list(found) for other, found in list(_pools_by_app.items()) if other.main == app.main), [])
