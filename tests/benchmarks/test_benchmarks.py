"""Every benchmark runs and gives numbers; the report is written from them. Nothing here looks at a time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("celery_svcs", reason="the dependency group `benchmarks` is not installed")
pytest.importorskip("dependency_injector")

from benchmarks.__main__ import NAMES
from benchmarks.measure import Figure, alternate, at_least, at_most, paired, quartiles
from benchmarks.report import write
from benchmarks.result import Result
from tests.support.paths import ROOT, environment


@pytest.mark.slow
@pytest.mark.worker
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_benchmark_gives_numbers(name: str, tmp_path: Path) -> None:
    """A trial run prints one line of JSON, whose figures are numbers and whose ratios are positive."""
    command = [sys.executable, "-m", "benchmarks", name, "--json", "--quick", "--save", "--folder", str(tmp_path)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout)
    assert printed["name"] == name
    assert printed["quick"]
    assert printed["ratios"]
    for label, figure in printed["ratios"].items():
        assert all(math.isfinite(figure[key]) for key in ("median", "low", "high")), label
        assert figure["unit"] != "×" or figure["median"] > 0, label
        assert (figure["goal"] is None) == (figure["holds"] is None), label
    assert printed["machine"]["cores"] >= 1
    assert printed["versions"]["celery"]
    kept = json.loads((tmp_path / f"{name}.json").read_text())
    assert kept["ratios"].keys() == printed["ratios"].keys()


def test_report_is_written_from_results(tmp_path: Path) -> None:
    """The page has each figure, its goal and the machine; the plots are SVG."""
    pytest.importorskip("matplotlib")
    ratios = {"ours over theirs": quartiles([1.0, 1.5, 2.0], goal=at_least(1.25)), "added": quartiles([3.0], "µs")}
    Result("liveness", "How much?", ratios, details={"tasks": {"a": 1}, "rounds": 3}).save(tmp_path)
    Result("scale", "How many?", ratios, series={"memory, MiB, ours": [(2, 1), (4, 2)]}, axes=("n", "y")).save(tmp_path)
    docs = tmp_path / "docs"
    docs.mkdir()
    page, *pictures = write(tmp_path, docs)
    text = page.read_text(encoding="utf-8")
    assert "| ours over theirs | 1.5 × | 1.25 to 1.75 | 3 | ≥ 1.25 | yes |" in text
    assert "load average" in text
    assert max(map(len, (line for line in text.splitlines() if not line.startswith("|")))) <= 115
    assert [picture.name for picture in pictures] == ["liveness.svg", "scale.svg"]
    assert all("<svg" in picture.read_text(encoding="utf-8") for picture in pictures)


def test_report_needs_a_result(tmp_path: Path) -> None:
    """Without results there is nothing to write, and the error says how to get some."""
    with pytest.raises(FileNotFoundError, match="--save"):
        write(tmp_path, tmp_path)


def test_alternation_favours_nobody() -> None:
    """Each side goes first as often as last, after a sample of each that is thrown away."""
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = alternate({"a": lambda: side("a"), "b": lambda: side("b")}, 2)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert samples == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_pairs_cancel_what_both_suffer_from() -> None:
    """The ratio is the median of the rounds' ratios; a goal is held by the median."""
    assert paired([2.0, 20.0, 200.0], [1.0, 10.0, 100.0], at_least(2.0)) == Figure(2.0, 2.0, 2.0, 3, "×", at_least(2.0))
    added = paired([5.0, 6.0, 7.0], [4.0, 4.0, 4.0], at_most(1.5), difference="ms")
    assert (added.median, added.holds) == (2.0, False)
