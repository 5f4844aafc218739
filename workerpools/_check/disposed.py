"""Which engines of a module each forked child drops before its first task, without a word to the server."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from celery.signals import worker_process_init

__all__ = ["dropped_by_children"]

#: Drivers whose connections a child may let go of: they notice that another process made them, or close their
#: descriptor alone. Measured in tests/check/test_disposed.py.
_DRIVERS = {"psycopg", "psycopg2", "pymysql"}
#: How many calls deep a receiver is followed.
_DEPTH = 3


def dropped_by_children() -> set[int]:
    """Return the ids of the engines that receivers of ``worker_process_init`` ``dispose(close=False)``."""
    found: set[int] = set()
    for receiver in worker_process_init._live_receivers(None):
        for engine in _disposed(inspect.unwrap(receiver), _DEPTH):
            driver = getattr(getattr(engine, "dialect", None), "driver", None)
            if driver in _DRIVERS:
                found.add(id(engine))
    return found


def _disposed(function: Any, depth: int) -> Iterator[Any]:
    names = getattr(function, "__globals__", None)
    if names is None or not depth:
        return
    tree = None
    with suppress(OSError, TypeError, SyntaxError):
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for call in ast.walk(tree) if tree is not None else ():
        if not isinstance(call, ast.Call):
            continue
        if isinstance(call.func, ast.Name):
            yield from _disposed(names.get(call.func.id), depth - 1)
        elif isinstance(call.func, ast.Attribute) and call.func.attr == "dispose":
            close = [each.value for each in call.keywords if each.arg == "close"] + call.args
            if close and isinstance(close[0], ast.Constant) and close[0].value is False:
                # Anything may happen in a property, as in one that needs an application's context.
                with suppress(Exception):
                    yield _value(call.func.value, names)


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Attribute):
        return getattr(_value(node.value, names), node.attr)
    return names[node.id] if isinstance(node, ast.Name) else None
