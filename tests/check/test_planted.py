"""The app of ``planted`` has a defect for each code, and each is found at its place; the app of ``clean`` has none."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from click.testing import CliRunner

import workerpools
from demo_tasks.servers import PostgresServer, ValkeyServer
from tests.support.databases import new_database
from tests.support.paths import environment
from tests.support.upstream import EchoUpstream
from workerpools._check import budget, fork_hazards, settings
from workerpools._check.codes import ALL
from workerpools._check.commands import pools
from workerpools._check.findings import Finding, Severity, exit_status

HERE = Path(__file__).parent
_MARK = re.compile(r"# planted: ([\w, ]+)$", re.MULTILINE)

#: What has no line of its own.
ELSEWHERE = {("WP102", "planted")}

Check = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def check(
    postgres_server: PostgresServer, valkey_server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Check]:
    """Runs ``celery pools check`` in the directory of the two apps."""
    with new_database(postgres_server) as database, EchoUpstream() as echo:
        environ = environment(
            {
                "API_URL": echo.url,
                "BROKER_URL": valkey_server.start().url(),
                "DATABASE_URL": database.url(),
                "PLANTED": str(tmp_path_factory.mktemp("planted")),
                "NO_PROXY": "127.0.0.1,localhost",
            }
        )

        def run(app: str, *options: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "celery", "-A", app, "pools", "check", *options]
            return subprocess.run(command, cwd=HERE, env=environ, capture_output=True, text=True, timeout=90)

        yield run


@pytest.fixture(scope="module")
def planted(check: Check) -> tuple[int, dict[str, Any]]:
    """The exit status and the document of a check of the planted app."""
    done = check("planted.app", "--json")
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def marked() -> set[tuple[str, str]]:
    """The codes that the planted app's comments say, each with its place."""
    return {
        (code.strip(), f"planted/{path.name}:{number}")
        for path in (HERE / "planted").glob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := _MARK.search(line)) is not None and path.name != "__init__.py"
        for code in match[1].split(",")
    }


def test_each_defect_is_found_at_its_place_and_nothing_else(planted: tuple[int, dict[str, Any]]) -> None:
    """Code and line of each; the comments of the source say which."""
    status, document = planted
    found = {(each["code"], each["where"]) for each in document["findings"]}
    assert found == marked() | ELSEWHERE
    assert status == 2


def test_every_code_is_planted() -> None:
    """Or has a test of its own: below, or in test_budget.py."""
    alone = {"WP110", "WP111", "WP112", *(each.code for each in (*settings.CODES, *budget.CODES))}
    assert {code for code, _ in marked() | ELSEWHERE} == ALL.keys() - alone


def test_nothing_is_found_where_nothing_is_wrong(check: Check) -> None:
    """The app prints at import; the report does not pass by there."""
    done = check("clean.app")
    assert done.stdout.splitlines()[-1] == "Nothing found."
    assert done.returncode == 0


def test_a_finding_has_all_that_is_to_be_known(planted: tuple[int, dict[str, Any]]) -> None:
    """The document's schema; errors stand first, and no password is in it."""
    document = planted[1]
    assert document.keys() == {"version", "findings"}
    assert document["version"] == 1
    for each in document["findings"]:
        assert each.keys() == {"code", "severity", "where", "what", "why", "fix"}
        assert all(each.values())
    severities = [each["severity"] for each in document["findings"]]
    assert severities == sorted(severities, key=["error", "warning", "hint"].index)


@pytest.mark.parametrize("code", sorted(ALL))
def test_each_code_is_explained(code: str) -> None:
    """``--explain`` needs no app's modules: title, example, why, fix."""
    done = CliRunner().invoke(pools, ["check", "--explain", code.lower()])
    assert done.exit_code == 0
    assert done.output.startswith(f"{code} ({ALL[code].severity}): {ALL[code].title}\n")
    assert f"\nWhy: {ALL[code].why}\nFix: {ALL[code].fix}\n" in done.output


def test_an_unknown_code_is_not_explained() -> None:
    """The codes are listed."""
    done = CliRunner().invoke(pools, ["check", "--explain", "WP9"])
    assert done.exit_code == 2
    assert "WP101, " in done.output


@pytest.mark.parametrize(
    ("severities", "status"),
    [((), 0), (("hint",), 0), (("hint", "warning"), 1), (("error", "hint"), 2)],
)
def test_the_exit_status_is_that_of_the_worst(severities: tuple[Severity, ...], status: int) -> None:
    """0 for hints alone, 1 for warnings, 2 for errors."""
    assert exit_status(ALL["WP201"].at("here", "it", severity) for severity in severities) == status


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Writes and imports a module whose text has one app, ``app``; forgotten at the end."""
    names: list[str] = []
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text: str) -> Any:
        names.append(f"made_{len(names)}_{tmp_path.name}")
        (tmp_path / f"{names[-1]}.py").write_text(f"import os, time\nfrom celery import Celery\n{text}\n")
        return importlib.import_module(names[-1])

    yield write
    for name in names:
        sys.modules.pop(name, None)


def codes(findings: list[Finding]) -> list[str]:
    """The codes of findings, in their order."""
    return [each.code for each in findings]


def test_an_app_that_cannot_be_imported_is_a_finding(
    module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the line, and the traceback's last line without passwords."""
    made = module("app = Celery('a')\nif os.environ.get('BROKEN'):\n    raise ValueError('no http://u:secret@host/')")
    monkeypatch.setenv("BROKEN", "1")
    (found,) = workerpools.check(made.app)
    assert (found.code, found.where) == ("WP110", f"{made.__file__}:5")
    assert found.what == "ValueError: no http://***@host/"
    monkeypatch.delenv("BROKEN")
    made = module("app = Celery('a')\nif os.environ.get('BROKEN'):\n    os._exit(3)")
    monkeypatch.setenv("BROKEN", "1")
    (found,) = workerpools.check(made.app)
    assert (found.code, found.what) == ("WP110", "the process that imports it ended with 3")


def test_an_import_that_takes_too_long_is_ended(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is what it started."""
    monkeypatch.setattr(fork_hazards, "TIMEOUT", 0.3)
    made = module("app = Celery('a')\nif os.environ.get('SLOW'):\n    time.sleep(60)")
    monkeypatch.setenv("SLOW", "1")
    assert codes(workerpools.check(made.app)) == ["WP111"]


def test_an_app_without_a_module() -> None:
    """Made by a function, as in a test: its import cannot be repeated."""
    (found,) = workerpools.check(Celery("nowhere", set_as_current=False))
    assert (found.code, found.severity) == ("WP112", "hint")


def test_codes_that_the_setting_leaves_out(module: Callable[[str], Any]) -> None:
    """With a reason; one without leaves nothing out, and one that does not exist is an error."""
    made = module("import httpx\napp = Celery('a')\nclient = httpx.Client()")
    assert codes(workerpools.check(made.app)) == ["WP104"]
    made.app.conf.workerpools_check_ignore = {"WP104": "used by the web process alone"}
    assert workerpools.check(made.app) == []
    made.app.conf.workerpools_check_ignore = {"WP104": " "}
    assert codes(workerpools.check(made.app)) == ["WP001", "WP104"]
    made.app.conf.workerpools_check_ignore = {"WP1O4": "a letter"}
    assert codes(workerpools.check(made.app)) == ["WP002", "WP104"]
