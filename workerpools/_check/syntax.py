"""Reads a project's source without importing it: modules, what their names mean, and who is a task."""

from __future__ import annotations

import ast
import functools
import os
from collections.abc import Collection, Iterator
from typing import Any, TypeGuard

from workerpools._check.own import is_own, shown

__all__ = ["Function", "Module", "Project", "is_function", "keyword", "last", "nodes_of"]

Function = ast.FunctionDef | ast.AsyncFunctionDef

#: How far a name is followed through modules that import it from each other.
_HOPS = 5
#: The files of a project that are read at most.
_MOST = 1000


def is_function(node: object) -> TypeGuard[Function]:
    """Return whether a node defines a function."""
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def last(node: ast.expr) -> str:
    """Return the last part of a name, ``session`` of ``db.session``; empty for anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    """Return a keyword argument; None if it is not written."""
    return next((each.value for each in call.keywords if each.arg == name), None)


@functools.lru_cache(maxsize=1024)
def targets(node: ast.AST) -> list[ast.expr]:
    """Return what a node gives a value to; nothing for a node that is no assignment."""
    if isinstance(node, ast.Assign):
        return node.targets
    if isinstance(node, ast.withitem):
        return [] if node.optional_vars is None else [node.optional_vars]
    return [node.target] if isinstance(node, ast.AnnAssign | ast.NamedExpr) else []


def nodes_of(node: ast.AST, *, nested: bool = True) -> list[ast.AST]:
    """Return every node below a node, in the order of the source.

    Args:
        node: The root, which is not among them.
        nested: Whether functions that it defines count.
    """
    found: list[ast.AST] = []
    waiting = [*ast.iter_child_nodes(node)][::-1]
    while waiting:
        each = waiting.pop()
        if nested or not (is_function(each) or isinstance(each, ast.Lambda)):
            found.append(each)
            waiting += [*ast.iter_child_nodes(each)][::-1]
    return found


class Module:
    """One file.

    Args:
        project: Where it belongs.
        name: The module's dotted name.
        path: The file.
        text: Its source.
    """

    def __init__(self, project: Project, name: str, path: str, text: str) -> None:
        self.project = project
        self.name = name
        self.path = path
        self.text = text
        self.tree = ast.parse(text)
        package = name if os.path.basename(path) == "__init__.py" else name.rpartition(".")[0]
        #: What each imported name means; those imported in functions, too.
        self.imports: dict[str, str] = {}
        #: Every module that may be imported.
        self.imported: list[str] = []
        #: Every node, and every function.
        self.nodes = nodes_of(self.tree)
        self.defined = [node for node in self.nodes if is_function(node)]
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.imports[alias.asname or alias.name.partition(".")[0]] = (
                        alias.name if alias.asname else alias.name.partition(".")[0]
                    )
                    self.imported.append(alias.name)
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                self.imported.append(base)
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = f"{base}.{alias.name}"
                    self.imported.append(f"{base}.{alias.name}")
        self.functions: dict[str, Function] = {}
        self.classes: dict[str, ast.ClassDef] = {}
        self.assigned: dict[str, ast.expr] = {}
        self._locals: dict[int, frozenset[str]] = {}
        for node in _top_level(self.tree.body):
            if is_function(node):
                self.functions[node.name] = node
            elif isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            else:
                self.assigned.update(_assigned(node))

    @functools.cached_property
    def shown(self) -> str:
        """The file, as findings name it."""
        return shown(self.path)

    def place(self, node: ast.AST) -> str:
        """Return ``file:line`` of a node."""
        return f"{self.shown}:{getattr(node, 'lineno', 1)}"

    def locals_of(self, function: Function | None) -> frozenset[str]:
        """Return the names that mean something of the function's own."""
        if function is None:
            return frozenset()
        found = self._locals.get(id(function))
        if found is None:
            found = self._locals[id(function)] = frozenset(_locals(function))
        return found

    def dotted(self, node: ast.AST, function: Function | None = None) -> str:
        """Return what a name means, as ``package.module.name``; empty if that is not known.

        Args:
            node: The name.
            function: The function in which it stands.
        """
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id in self.locals_of(function):
            return ""
        root = self.imports.get(node.id)
        if root is None:
            known = node.id in self.functions or node.id in self.classes or node.id in self.assigned
            root = f"{self.name}.{node.id}" if known else node.id
        return self.project.canonical(".".join([root, *reversed(parts)]))

    def called(self, node: ast.AST | None, function: Function | None = None) -> str:
        """Return what a call calls; empty for anything else."""
        return self.dotted(node.func, function) if isinstance(node, ast.Call) else ""


class Project:
    """The modules below some directories.

    Args:
        roots: Directories from which modules are imported.
    """

    def __init__(self, roots: Collection[str]) -> None:
        self._roots = [*roots]
        self.modules: dict[str, Module | None] = {}
        #: What functions were found to do, by what they are given: many call the same one.
        self.events: dict[object, Any] = {}
        #: The functions that are being looked into: one may call itself.
        self.entering: set[int] = set()

    def add(self, name: str, path: str) -> Module | None:
        """Return the module of a file; None if it cannot be read."""
        if name not in self.modules:
            self.modules[name] = None
            if len(self.modules) <= _MOST:
                try:
                    with open(path, encoding="utf-8") as file:
                        self.modules[name] = Module(self, name, path, file.read())
                except (OSError, SyntaxError, ValueError, RecursionError):
                    pass
        return self.modules[name]

    def module(self, name: str) -> Module | None:
        """Return a module of the project by its name; None for anyone else's."""
        if name in self.modules:
            return self.modules[name]
        parts = name.split(".")
        if all(part.isidentifier() for part in parts):
            for root in self._roots:
                for path in (os.path.join(root, *parts) + ".py", os.path.join(root, *parts, "__init__.py")):
                    if os.path.isfile(path) and is_own(name, path):
                        return self.add(name, path)
        self.modules[name] = None
        return None

    def closure(self, begin: Collection[Module]) -> list[Module]:
        """Return the modules and those of the project that they import, by whatever way."""
        found = {module.name: module for module in begin}
        waiting = [*begin]
        while waiting:
            for name in waiting.pop().imported:
                other = None if name in found else self.module(name)
                if other is not None:
                    found[name] = other
                    waiting.append(other)
        return list(found.values())

    def canonical(self, dotted: str) -> str:
        """Return where a name is defined, following the project's own modules that import it."""
        for _ in range(_HOPS):
            module, name, rest = self._split(dotted)
            if module is None or name not in module.imports:
                break
            dotted = ".".join([module.imports[name], *rest])
        return dotted

    def _split(self, dotted: str) -> tuple[Module | None, str, list[str]]:
        parts = dotted.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            module = self.module(".".join(parts[:cut]))
            if module is not None:
                return module, parts[cut], parts[cut + 1 :]
        return None, "", []

    def value(self, dotted: str) -> tuple[Module, ast.expr] | None:
        """Return the value that a module assigns to a name, and that module."""
        module, name, rest = self._split(dotted)
        return (module, module.assigned[name]) if module and not rest and name in module.assigned else None

    def constructor(self, dotted: str) -> str:
        """Return what is called for the value of a name; empty if it is no call."""
        found = self.value(dotted)
        return found[0].called(found[1]) if found else ""

    def function(self, dotted: str) -> tuple[Module, Function] | None:
        """Return a function of the project, and its module."""
        module, name, rest = self._split(dotted)
        return (module, module.functions[name]) if module and not rest and name in module.functions else None

    def class_(self, dotted: str) -> tuple[Module, ast.ClassDef] | None:
        """Return a class of the project, and its module."""
        module, name, rest = self._split(dotted)
        return (module, module.classes[name]) if module and not rest and name in module.classes else None

    def ancestors(self, module: Module, class_: ast.ClassDef) -> Iterator[str | tuple[Module, ast.ClassDef]]:
        """Yield a class and what it inherits from: classes of the project, and names of others."""
        waiting: list[str | tuple[Module, ast.ClassDef]] = [(module, class_)]
        seen: set[int] = set()
        while waiting:
            each = waiting.pop(0)
            yield each
            if isinstance(each, tuple) and id(each[1]) not in seen:
                seen.add(id(each[1]))
                for base in each[1].bases:
                    dotted = each[0].dotted(base)
                    waiting.append(self.class_(dotted) or dotted)


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from _top_level([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from _top_level([*node.body, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.With):
            yield from _top_level(node.body)


def _assigned(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Assign):
        yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
        yield node.target.id, node.value


def _locals(function: Function) -> Iterator[str]:
    foreign: set[str] = set()
    found: list[str] = []
    arguments = function.args
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if each is not None:
            found.append(each.arg)
    for node in nodes_of(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.append(node.name)
        elif isinstance(node, ast.Global):
            foreign.update(node.names)
    return (name for name in found if name not in foreign)
