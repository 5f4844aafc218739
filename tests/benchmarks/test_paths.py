"""`python -m benchmarks paths` counts frames and files on three ways through the package, and has a budget for each."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
from rich.console import Console

pytest.importorskip("flower")

from benchmarks import __main__ as command
from benchmarks import paths
from benchmarks.paths import BUDGET, PACKAGE, Step, Way, show
from tests.support.paths import ROOT, environment


class Counted(NamedTuple):
    """What one run of the command printed, and its exit code."""

    code: int
    ways: Mapping[str, Any]


@pytest.fixture(scope="module")
def counted() -> Counted:
    """One real run."""
    arguments = [sys.executable, "-m", "benchmarks", "paths", "--json", "--list"]
    done = subprocess.run(arguments, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    ways = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert ways, done.stderr[-3000:]
    return Counted(done.returncode, {way["name"]: way for way in ways})


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_each_way_is_counted_from_end_to_end(counted: Counted) -> None:
    """Each begins and ends where it is said to; all that is listed exists in the package."""
    assert counted.ways.keys() == BUDGET.keys()
    files = {name: [line.partition(":")[0] for line in way["steps"]] for name, way in counted.ways.items()}
    assert all((PACKAGE / file).is_file() for listed in files.values() for file in listed)

    warm = counted.ways["warm task"]
    assert warm["frames"] == len(warm["steps"]) > warm["files"] == len(set(files["warm task"])) > 1
    assert files["warm task"][0].startswith("_celery/")
    assert any(file.startswith("sqlalchemy/") for file in files["warm task"])

    lost = counted.ways["lost connection"]
    assert lost["frames"] == len(lost["steps"]) > lost["files"] == len(set(files["lost connection"])) > 1
    assert files["lost connection"][0].startswith("sqlalchemy/")
    assert lost["steps"][-1].endswith(":decide")
    assert sum(step.endswith(":decide") for step in lost["steps"]) == 1

    statistic = files["statistic"]
    python = [file for file in statistic if file.endswith(".py")]
    scripts = [file for file in statistic if file.endswith(".js")]
    assert counted.ways["statistic"]["files"] == len(set(python))
    assert counted.ways["statistic"]["scripts"] == len(scripts) == len(set(scripts)) > 1
    assert statistic == python + scripts
    rooms = list(dict.fromkeys(file.partition("/")[0] for file in python))
    assert [room for room in rooms if room in ("sqlalchemy", "_celery", "flower")] == [
        "sqlalchemy",
        "_celery",
        "flower",
    ]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_exit_code_says_whether_the_budget_holds(counted: Counted) -> None:
    """A real run exits with 1 exactly where a figure is above its budget."""
    over = {
        name: {figure: way[figure] for figure, most in BUDGET[name].items() if way[figure] > most}
        for name, way in counted.ways.items()
    }
    assert {name: way["over"] for name, way in counted.ways.items()} == over
    assert counted.code == int(any(over.values()))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_budget_holds(counted: Counted) -> None:
    """No way is longer than its budget."""
    assert {name: way["over"] for name, way in counted.ways.items() if way["over"]} == {}


def way(name: str, frames: int) -> Way:
    """Return a way of so many frames, each in the other of two files."""
    return Way(name, [Step(f"{'ab'[number % 2]}.py", f"f{number}") for number in range(frames)])


@pytest.mark.parametrize(("frames", "code"), [(60, 0), (61, 1)])
def test_a_frame_too_many_fails_the_command(frames: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget itself is allowed."""
    monkeypatch.setattr(command, "running", lambda: nullcontext(object()))
    monkeypatch.setattr(paths, "measure", lambda servers: [way("warm task", frames)])
    assert command.main(["paths"]) == code


def test_figures_are_counted() -> None:
    """Frames are calls, files are distinct, and a move is a next call in another file."""
    steps = [Step("a.py", "f"), Step("a.py", "g"), Step("b.py", "h"), Step("a.py", "f")]
    assert Way("warm task", steps).counts == {"frames": 4, "files": 2, "moves": 2}
    statistic = Way("statistic", steps, ("x.js", "y.js", "z.js", "é.js"), ("files", "scripts"))
    assert statistic.counts == {"files": 2, "scripts": 4}
    assert statistic.over == {"scripts": 4}


def test_list_shows_what_to_cut() -> None:
    """Each frame stands before the table as file and function, in order."""
    written = io.StringIO()
    show([way("warm task", 2)], listed=True, console=Console(file=written, width=100))
    text = written.getvalue()
    assert text.splitlines()[:3] == ["warm task:", "  a.py:f0", "  b.py:f1"]
    assert "60 frames" in text
    assert "yes" in text
