"""What importing costs: the rules on imports that a contract of import-linter cannot say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

PACKAGE = Path(__file__).parents[2] / "workerpools"
CORE = sorted([*(PACKAGE / "_core").rglob("*.py"), PACKAGE / "errors.py"])
EXPORTERS = ["opentelemetry", "prometheus_client"]
CLIENTS = [
    "httpx",
    "httpcore",
    "httpx2",
    "httpcore2",
    "sqlalchemy",
    "psycopg",
    "psycopg2",
    "redis",
    "requests",
    *EXPORTERS,
]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            assert node.module is not None
            found.add(node.module)
            if node.module == "workerpools":
                found |= {f"workerpools.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_core_imports_the_standard_library_only(path: Path) -> None:
    """The core and the errors use the standard library and each other, and the root package not at all."""
    foreign = {
        name
        for name in imported(path)
        if name.split(".")[0] not in sys.stdlib_module_names
        and not name.startswith(("workerpools._core", "workerpools.errors"))
    }
    assert foreign == set()


@pytest.mark.parametrize("module", ["workerpools", "workerpools.bases"])
def test_importing_loads_no_client_library(module: str) -> None:
    """Nothing but Celery is loaded: a worker without a database pays nothing for SQLAlchemy."""
    code = f"import {module}, sys; print(*sorted(set({CLIENTS!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_works_without_any_client_library() -> None:
    """With no extra installed the package imports, and the bases are there."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({CLIENTS!r}))\n"
        "from workerpools import DatabaseTask, HTTPTask, PooledTask, WorkerPools"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("module", "library", "extra", "distribution"),
    [
        ("workerpools.httpx", "httpx", "httpx", "httpx"),
        ("workerpools.httpx2", "httpx2", "httpx2", "httpx2"),
        ("workerpools.requests", "requests", "requests", "requests"),
        ("workerpools.sqlalchemy", "sqlalchemy", "sqlalchemy", "sqlalchemy"),
        ("workerpools.prometheus", "prometheus_client", "prometheus", "prometheus-client"),
        ("workerpools.opentelemetry", "opentelemetry", "opentelemetry", "opentelemetry-api"),
    ],
)
def test_the_missing_library_is_named(module: str, library: str, extra: str, distribution: str) -> None:
    """With its extra, and with a command that works from a checkout too: the extra brings what it installs."""
    assert failed_import(f"import {module}", library) == (
        f"{library}: {module} needs {library}, which the extra '{extra}' brings: pip install {distribution}"
    )
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    assert re.search(rf'^{extra} = .*"{distribution}[">]', project, re.MULTILINE)


@pytest.mark.parametrize(
    ("base", "attribute", "library"),
    [
        ("HTTPTask", "http", "httpx"),
        ("DatabaseTask", "engine", "sqlalchemy"),
        ("DatabaseTask", "session", "sqlalchemy"),
    ],
)
def test_a_base_names_the_missing_extra(base: str, attribute: str, library: str) -> None:
    """When a body uses it."""
    code = (
        "import celery, workerpools\n"
        "app = celery.Celery()\n"
        "app.conf.workerpools_database_url = 'sqlite://'\n"
        f"@app.task(bind=True, base=workerpools.{base}, name='t')\n"
        f"def t(self): self.{attribute}\n"
        "t()"
    )
    assert f"which the extra '{library}' brings: pip install {library}" in failed_import(code, library)


@pytest.mark.parametrize(
    ("module", "missing"),
    [("workerpools.httpx", "idna"), ("workerpools.sqlalchemy", "typing_extensions")],
)
def test_what_a_library_needs_itself_is_no_extra(module: str, missing: str) -> None:
    """An installation that is broken otherwise keeps its own error."""
    told = failed_import(f"import {module}", missing)
    assert told.startswith(f"{missing}: ")
    assert "pip install" not in told


def failed_import(code: str, missing: str) -> str:
    """What is raised where ``missing`` is not installed: the name that was not found, and the message."""
    lines = (
        f"import sys; sys.modules[{missing!r}] = None",
        "try:",
        indent(code, "    "),
        "except ModuleNotFoundError as error:",
        "    print(f'{error.name}: {error}')",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_celery_command_stays_light() -> None:
    """Every ``celery`` call loads what adds ``celery pools`` to it: no client library, and nothing that it alone
    needs."""
    # Celery itself looks for redis, which looks for OpenTelemetry; Flower's own command loads prometheus_client.
    ours = {"rich", "workerpools._celery.cli.rows", "workerpools._stats.report", "workerpools._stats.snapshot"}
    heavy = {*CLIENTS, *ours} - {"redis", "opentelemetry", "prometheus_client"}
    code = (
        "import celery.bin.celery, sys; assert 'pools' in celery.bin.celery.celery.commands; "
        f"print(*sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_message_installs_what_no_index_has() -> None:
    """There may be no release yet: a message names the library that is missing, not an extra of ours alone."""
    messages = [path for path in PACKAGE.rglob("*.py") if re.search(r"pip install ['\"]?workerpools", path.read_text())]
    assert messages == []
