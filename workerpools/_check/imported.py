"""Imports an app as a worker's main process does, and reports what that leaves open.

``python -m workerpools._check.imported APP DESCRIPTOR``: the report goes to the descriptor, because the app may print.
"""

from __future__ import annotations

import ast
import gc
import json
import os
import socket
import sys
import threading
import traceback
import types
from collections.abc import Collection, Iterator
from typing import Any

from celery.app.utils import find_app

from workerpools._celery import apps
from workerpools._check.disposed import dropped_by_children
from workerpools._check.own import is_own, shown
from workerpools._process.descriptors import fileno, numbers
from workerpools._text import redact_text

__all__ = ["report"]

#: What an object of a library is, by its class and by those that it inherits from: a code, and a word for it.
_KINDS = {
    "aiohttp.client.ClientSession": ("WP107", "an aiohttp.ClientSession"),
    "asyncio.events.AbstractEventLoop": ("WP107", "an event loop"),
    "httpx.AsyncClient": ("WP107", "an httpx.AsyncClient"),
    "httpx.Client": ("WP104", "an httpx.Client"),
    "httpx2.AsyncClient": ("WP107", "an httpx2.AsyncClient"),
    "httpx2.Client": ("WP104", "an httpx2.Client"),
    "pymongo.mongo_client.MongoClient": ("WP104", "a MongoClient"),
    "pymongo.synchronous.mongo_client.MongoClient": ("WP104", "a MongoClient"),
    "redis.asyncio.client.Redis": ("WP107", "a redis.asyncio.Redis"),
    "redis.client.Redis": ("WP105", "a redis.Redis"),
    "redis.connection.ConnectionPool": ("WP105", "a redis.ConnectionPool"),
    "requests.sessions.Session": ("WP104", "a requests.Session"),
    "sqlalchemy.engine.base.Engine": ("WP103", "an engine"),
    "sqlalchemy.ext.asyncio.engine.AsyncEngine": ("WP107", "an AsyncEngine"),
    "sqlalchemy.ext.asyncio.session.AsyncSession": ("WP106", "an AsyncSession"),
    "sqlalchemy.orm.session.Session": ("WP106", "a Session"),
    "urllib3.poolmanager.PoolManager": ("WP104", "a urllib3.PoolManager"),
    "valkey.asyncio.client.Valkey": ("WP107", "a valkey.asyncio.Valkey"),
    "valkey.client.Valkey": ("WP105", "a valkey.Valkey"),
    "valkey.connection.ConnectionPool": ("WP105", "a valkey.ConnectionPool"),
    "workerpools._pools.resource.Resource": ("WP109", "a resource"),
}
#: How deep a name's value is looked into, how many parts of a container, and how many objects behind one of them.
_DEPTH, _PARTS, _OBJECTS = 4, 200, 20_000

_CODE = (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType, types.CodeType, types.FrameType)


def report(name: str) -> list[dict[str, str]]:
    """Import the app of this name, and return what that leaves open.

    Args:
        name: As the option ``-A`` of ``celery`` takes it.
    """
    before = numbers()
    try:
        app = find_app(name)
        app.loader.import_default_modules()
        app.finalize()
    except BaseException as error:
        # SystemExit, too: some modules end the process when a variable of the environment is missing.
        return [_failed(name, error)]
    modules = [
        (name, module)
        for name, module in list(sys.modules.items())
        if name != "__main__" and is_own(name, getattr(module, "__file__", None))
    ]
    return _Look(app, modules, {number for number, _ in numbers() - before}).found()


def _failed(name: str, error: BaseException) -> dict[str, str]:
    if isinstance(error, ValueError) and str(error).startswith("Couldn't import") and error.__context__ is not None:
        # Of Celery's own making.
        error = error.__context__
    frames = traceback.extract_tb(error.__traceback__)
    own = next((each for each in reversed(frames) if is_own("", each.filename)), None)
    what = redact_text(traceback.format_exception_only(type(error), error)[-1].strip())
    where = name if own is None else f"{shown(own.filename)}:{own.lineno}"
    return {"code": "WP110", "where": where, "path": "", "what": what}


class _Look:
    """One look at what is open.

    Args:
        app: The app.
        modules: The user's own modules.
        sockets: The descriptors of the sockets that were opened since.
    """

    def __init__(self, app: Any, modules: list[tuple[str, Any]], sockets: Collection[int]) -> None:
        self._app = app
        self._modules = modules
        self._left = {number for number in sockets if _leads_somewhere(number)}
        self._sources: dict[str, dict[str, int]] = {}

    def found(self) -> list[dict[str, str]]:
        """Return a finding for each object, socket and thread."""
        found: list[dict[str, str]] = []
        resources = [each for pools in apps.all_of(self._app) for each in pools.resources if each.is_open]
        for each in resources:
            self._left -= set(each._holder.live.opening.descriptors.filenos())
        dropped = dropped_by_children()
        for (code, word), path, module, value in self._named():
            if code == "WP109":
                if not value.is_open:
                    continue
                resources = [each for each in resources if each is not value]
            held = self._held(value) if code != "WP109" else set()
            pooled = _pooled(value) if code == "WP103" else 0
            if id(value) in dropped and not value.pool.checkedout():
                # No child shares what is in its pool.
                continue
            if code != "WP107" and (held or pooled):
                code, word = "WP101", f"{word} with {_counted(held) if held else f'{pooled} pooled'}"
            found.append(self._finding(code, path, module, f"{path} is {word}"))
        found += [
            {"code": "WP109", "where": each.name, "path": "", "what": f"the resource {each.name!r} is open"}
            for each in resources
        ]
        for path, module, value in self._values():
            if self._left and (held := self._held(value)):
                found.append(self._finding("WP101", path, module, f"{path} holds {_counted(held)}"))
        for number in sorted(self._left):
            found.append({"code": "WP102", "where": self._app.main or "the app", "path": "", "what": _peer(number)})
        return [*found, *self._threads()]

    def _named(self) -> Iterator[tuple[tuple[str, str], str, Any, Any]]:
        """Yield each object of a known kind once, with the name that defines it."""
        named: dict[int, list[tuple[str, Any, Any]]] = {}
        kinds: dict[int, tuple[str, str]] = {}
        for path, module, value in self._values():
            kind = _kind(value)
            if kind is not None:
                kinds[id(value)] = kind
                named.setdefault(id(value), []).append((path, module, value))
        for key, places in named.items():
            path, module, value = min(places, key=lambda each: self._line(each[0], each[1]) is None)
            yield kinds[key], path, module, value

    def _values(self) -> Iterator[tuple[str, Any, Any]]:
        """Yield what the user's modules reach: their names, classes' attributes, and simple containers."""
        seen: set[int] = set()
        for name, module in self._modules:
            for attribute, value in list(vars(module).items()):
                if not attribute.startswith("__"):
                    yield from self._parts(f"{name}.{attribute}", module, value, _DEPTH, seen)

    def _parts(self, path: str, module: Any, value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(value, types.ModuleType | types.FunctionType | str | bytes | int | float | None):
            return
        if isinstance(value, type):
            # Imported by others: it is looked into where it is defined.
            if value.__module__ != module.__name__ or id(value) in seen:
                return
            parts = [(f"{path}.{key}", each) for key, each in list(vars(value).items()) if not key.startswith("__")]
        else:
            yield path, module, value
            if id(value) in seen:
                return
            if isinstance(value, dict):
                parts = [(f"{path}[{key!r}]", each) for key, each in list(value.items())[:_PARTS]]
            elif isinstance(value, list | tuple | set | frozenset):
                parts = [(f"{path}[{number}]", each) for number, each in enumerate(list(value)[:_PARTS])]
            elif is_own(type(value).__module__, getattr(sys.modules.get(type(value).__module__), "__file__", None)):
                parts = [(f"{path}.{key}", each) for key, each in list(getattr(value, "__dict__", {}).items())]
            elif type(value).__module__.startswith("sqlalchemy.orm.scoping"):
                # Its registry makes a session for whoever asks: look at the one that is there.
                parts = [(f"{path}()", value.registry())] if value.registry.has() else []
            else:
                parts = []
        seen.add(id(value))
        if depth:
            for name, each in parts:
                yield from self._parts(name, module, each, depth - 1, seen)

    def _held(self, value: Any) -> set[int]:
        """Return the sockets that an object leads to, and take them from those that are left."""
        found: set[int] = set()
        seen: set[int] = set()
        waiting = [value]
        while waiting and len(seen) < _OBJECTS and self._left:
            each = waiting.pop()
            if id(each) in seen or isinstance(each, _CODE) or _kind(each, resource=True):
                continue
            seen.add(id(each))
            if hasattr(type(each), "fileno"):
                number = fileno(each)
                if number in self._left:
                    found.add(number)
                    self._left.discard(number)
            waiting += gc.get_referents(each)
        return found

    def _threads(self) -> Iterator[dict[str, str]]:
        for thread in threading.enumerate():
            if thread is threading.main_thread():
                continue
            target = getattr(thread, "_target", None)
            function = getattr(target, "__func__", target) or type(thread).run
            code = getattr(function, "__code__", None)
            module = sys.modules.get(getattr(function, "__module__", "") or "")
            name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', thread.name)}"
            own = code is not None and is_own(getattr(module, "__name__", ""), code.co_filename)
            yield {
                "code": "WP108",
                "where": f"{shown(code.co_filename)}:{code.co_firstlineno}" if own and code is not None else name,
                "path": code.co_filename if own and code is not None else "",
                "what": f"the thread {thread.name!r} runs {name}",
            }

    def _finding(self, code: str, path: str, module: Any, what: str) -> dict[str, str]:
        line = self._line(path, module)
        where = path if line is None else f"{shown(module.__file__)}:{line}"
        return {"code": code, "where": where, "path": module.__file__ if line is not None else "", "what": what}

    def _line(self, path: str, module: Any) -> int | None:
        """Return the line of the assignment to a name of a module, or of an attribute of its classes."""
        lines = self._sources.get(module.__file__)
        if lines is None:
            lines = self._sources[module.__file__] = _assignments(module)
        parts = path.removeprefix(f"{module.__name__}.").partition("[")[0].removesuffix("()").split(".")
        return next((lines[name] for cut in (2, 1) if (name := ".".join(parts[:cut])) in lines), None)


def _assignments(module: Any) -> dict[str, int]:
    try:
        with open(module.__file__, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return {}
    found: dict[str, int] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")
            elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                    found[prefix + child.id] = child.lineno
                visit(child, prefix)

    visit(tree, "")
    return found


def _kind(value: Any, *, resource: bool = False) -> tuple[str, str] | None:
    for each in type(value).__mro__:
        kind = _KINDS.get(f"{each.__module__}.{each.__qualname__}")
        if kind is not None and (not resource or kind[0] == "WP109"):
            return kind
    return None


def _pooled(engine: Any) -> int:
    """Return how many connections an engine has, also those without a socket of Python's."""
    return sum(getattr(engine.pool, name, int)() for name in ("checkedin", "checkedout"))


def _leads_somewhere(number: int) -> bool:
    """Whether a socket is connected: not a listener, nor one end of a pair within this process."""
    return bool(_address(number))


def _address(number: int) -> str:
    try:
        with socket.socket(fileno=os.dup(number)) as asked:
            peer = asked.getpeername()
    except OSError:
        return ""
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else os.fsdecode(peer)


def _peer(number: int) -> str:
    return f"a socket to {_address(number)} is open"


def _counted(held: Collection[int]) -> str:
    where = ", ".join(sorted({_address(number) for number in held}))
    return f"{len(held)} open connection{'' if len(held) == 1 else 's'} to {where}"


def main() -> None:
    """Report to the descriptor that the command line names, and end without running anything more of the app."""
    name, descriptor = sys.argv[1], int(sys.argv[2])
    # Not for what the app starts.
    os.set_inheritable(descriptor, False)
    text = json.dumps(report(name))
    with open(descriptor, "w", encoding="utf-8") as pipe:
        pipe.write(text)
    os._exit(0)


if __name__ == "__main__":
    main()
