"""The rooms of the package: who may import whom, computed from the source.

Every import counts: those inside of functions and those for type checkers are the same coupling. import-linter holds
the layers (pyproject.toml); here is what a contract cannot say.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "workerpools"
MODULES = {
    ".".join(("workerpools", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
CORE = ("_process", "_run", "_stats", "_pools", "_text", "_values", "errors", "adapter")

#: Which third-party packages each room may import; the others import the standard library alone.
LIBRARIES = {
    "_celery": {"celery", "kombu", "billiard", "click", "rich"},
    "_check": {"celery", "click"},
    "bases": {"httpx", "sqlalchemy"},
    "django": {"celery", "django"},
    "fastapi": {"fastapi"},
    "flask": {"flask", "sqlalchemy"},
    "flower": {"flower", "tornado", "celery"},
    "httpx": {"httpx"},
    "httpx2": {"httpx2"},
    "opentelemetry": {"opentelemetry"},
    "prometheus": {"prometheus_client"},
    "pytest_plugin": {"pytest", "httpx", "sqlalchemy"},
    "redis": {"redis"},
    "requests": {"requests", "urllib3"},
    # SQLAlchemy depends on typing_extensions, which has the default of a type variable before Python 3.13.
    "sqlalchemy": {"sqlalchemy", "psycopg", "psycopg2", "asyncpg", "typing_extensions"},
    "testing": {"celery", "pytest"},
}

#: Names of client libraries and their kinds, none of which the core may know. (``requests`` is a word of English, too.)
CLIENTS = re.compile(
    r"\b(httpx|httpcore|h11|h2|hpack|sqlalchemy|psycopg\w*|pymysql|mysqldb|redis|urllib3|http|database)\b",
    re.IGNORECASE,
)


@cache
def imports(module: str) -> frozenset[str]:
    """Every module that ``module`` imports, wherever in it."""
    return frozenset(_imports(module))


def _imports(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            # ``workerpools.httpx`` is loaded under a second name, too: there, and only there, imports are relative.
            inside = re.match(r"_[a-z]|workerpools\.httpx\b", node.module)
            relative = room(module) == "httpx" and inside is not None
            assert node.level == int(relative), f"{module}: line {node.lineno}"
            imported = f"workerpools.httpx.{node.module}" if relative else node.module
            # ``from package import module`` imports the module; of anything else, where it is defined.
            parts = {f"{imported}.{alias.name}" for alias in node.names} & MODULES.keys()
            yield from parts
            if len(parts) < len(node.names):
                yield imported


def graph() -> dict[str, set[str]]:
    """Who imports whom within the package."""
    return {module: set(imports(module)) & MODULES.keys() - {module} for module in MODULES}


def room(module: str) -> str:
    """The first name below the package."""
    return module.split(".")[1] if "." in module else ""


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(edges[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            group = [stack.pop()]
            while group[-1] != module:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(edges):
        if module not in index:
            visit(module)
    return found


def test_httpx_has_two_names() -> None:
    """One file imports the library; the others would bring httpx to httpx2."""
    users = {module for module in MODULES if room(module) == "httpx" and "httpx" in imports(module)}
    assert users == {"workerpools.httpx._library"}


def test_a_circle_is_found() -> None:
    """The check can fail."""
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert cycles({"a": {"b"}, "b": set()}) == []


def test_no_circle() -> None:
    """No module imports, by any way, one that imports it."""
    assert cycles(graph()) == []


@pytest.mark.parametrize("adapter", ["httpx", "redis", "requests", "sqlalchemy"])
def test_our_adapters_use_what_anyone_can(adapter: str) -> None:
    """Nothing of the project but the adapters' surface, the errors, and their own files."""
    used = {other for module in MODULES if room(module) == adapter for other in graph()[module]}
    assert {other for other in used if room(other) != adapter} <= {"workerpools.adapter", "workerpools.errors"}


def test_the_django_adapter_uses_what_anyone_can() -> None:
    """The task base beside it is Celery's part, and so is what a fork discards."""
    used = {other for module in MODULES if module.startswith("workerpools.django._") for other in graph()[module]}
    assert {other for other in used if room(other) != "django"} == {"workerpools.adapter"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_each_room_imports_its_own_libraries(module: str) -> None:
    """One third-party library, one room."""
    foreign = {name.split(".")[0] for name in imports(module)} - sys.stdlib_module_names - {"workerpools"}
    assert foreign <= LIBRARIES.get(room(module), set())


@pytest.mark.parametrize("module", sorted(module for module in MODULES if room(module) in CORE))
def test_the_core_names_no_client_library(module: str) -> None:
    """Neither in its code nor in its messages; a docstring may name one as an example."""
    tree = ast.parse(MODULES[module].read_text())
    documented = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    named = {
        found
        for node in ast.walk(tree)
        for text in (
            [node.value]
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            else [node.id]
            if isinstance(node, ast.Name)
            else [node.attr]
            if isinstance(node, ast.Attribute)
            else []
        )
        if id(node) not in documented
        for found in CLIENTS.findall(text)
    }
    assert named == set()
