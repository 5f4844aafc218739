"""What the source of the tasks says, without running it."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Collection, Iterable
from typing import Any

from workerpools._check import clients, silences, transactions
from workerpools._check.asked import Asked
from workerpools._check.bodies import bodies
from workerpools._check.findings import Code, Finding
from workerpools._check.own import is_own
from workerpools._check.syntax import Module, Project

__all__ = ["CODES", "check", "of_modules"]

CODES: tuple[Code, ...] = (*clients.CODES, *transactions.CODES)


def check(asked: Asked) -> list[Finding]:
    """Return what is wrong in the modules of the app's tasks and the project's modules that they import."""
    modules: dict[str, str] = {}
    lines: dict[str, set[int]] = {}
    for task in asked.app.tasks.values():
        body = inspect.unwrap(getattr(task.run, "__func__", task.run))
        code = getattr(body, "__code__", None)
        if code is not None:
            lines.setdefault(os.path.realpath(code.co_filename), set()).add(code.co_firstlineno)
        for name in {type(task).__module__, task.__module__, getattr(body, "__module__", "")}:
            path = getattr(sys.modules.get(name), "__file__", None)
            if is_own(name, path):
                modules[name] = str(path)
    project = Project(sorted({_root(name, path) for name, path in modules.items()}))
    begin = [each for name, path in modules.items() if (each := project.add(name, path)) is not None]
    found, silenced = of_modules(project.closure(begin), lines, asked.codes)
    asked.silenced.update(silenced)
    return found


def of_modules(
    modules: Iterable[Module], lines: Any, known: Collection[str]
) -> tuple[list[Finding], dict[str, frozenset[str]]]:
    """Return what is wrong with modules, and the codes that their comments leave out, by ``file:line``.

    Args:
        modules: The modules.
        lines: The first lines of functions that are bodies of tasks, by file.
        known: Every code.
    """
    found: list[Finding] = []
    silenced: dict[str, frozenset[str]] = {}
    for module in modules:
        left_out, wrong = silences.in_source(module.shown, module.text, known)
        silenced.update({f"{module.shown}:{line}": codes for line, codes in left_out.items()})
        found += wrong
        for check_module in (clients.of_module, transactions.of_module):
            found += check_module(module)
        for body in bodies(module, lines.get(os.path.realpath(module.path), ())):
            for check_body in (clients.of_body, transactions.of_body):
                found += check_body(body)
    # A function that two tasks call is named once.
    return list({(each.code, each.where): each for each in reversed(found)}.values())[::-1], silenced


def _root(name: str, path: str) -> str:
    depth = len(name.split(".")) - (os.path.basename(path) != "__init__.py")
    directory = os.path.dirname(os.path.abspath(path))
    for _ in range(depth):
        directory = os.path.dirname(directory)
    return directory
