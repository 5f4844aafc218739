"""Writes docs/benchmarks.md and its plots from the results that `--save` kept."""

from __future__ import annotations

import importlib
import json
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import __main__ as command
from benchmarks import plots

__all__ = ["DOCS", "write"]

DOCS = Path(__file__).parents[1] / "docs"

_WIDTH = 110

_HEAD = """
Each figure compares two ways of doing the same in one run, in alternation, on one machine: a ratio, or a
difference, as a median with its quartiles. A goal is met or missed by the median. Absolute times say more about
the machine than about the library.

This page is written by the benchmarks themselves: `python -m benchmarks --save` measures everything,
`python -m benchmarks report` writes the page, `python -m benchmarks liveness --json` answers one question. They
need the dependency groups `benchmarks` and `test`, and the extra `all`.

`python -m benchmarks paths` counts the functions and files of the package that a warm task, a lost connection and
a statistic pass through, and exits with 1 where one is over its budget. With `--list` it prints them in order.

The peers: *hand-written* is best practice without a library (clients in module globals, opened in
`worker_process_init`); *a client a task* and *an engine a task* open and close with each task; *`_db = None` on
the task* is the pattern of Celery's user guide; celery-svcs and dependency-injector inject what they are given,
and know nothing of connections; *pre_ping* is SQLAlchemy's `pool_pre_ping=True`; *autoretry_for* is hand-written
with `autoretry_for=(OperationalError,)` and `retry_backoff=True`.
"""


def write(folder: Path, docs: Path = DOCS) -> list[Path]:
    """Write the page and its plots; return the files.

    Args:
        folder: Where the results are.
        docs: Where `benchmarks.md` and the folder `benchmarks` with the plots go.

    Raises:
        FileNotFoundError: There is no result.
    """
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    results = [found[name] for name in command.NAMES if name in found]
    if not results:
        raise FileNotFoundError(f"no results in {folder}; make some: python -m benchmarks --save")
    pictures: list[Path] = []
    text = ["# Benchmarks", "", _HEAD.strip(), "", *_summary(results)]
    for result in results:
        text += _section(result, docs / "benchmarks", pictures)
    page = docs / "benchmarks.md"
    page.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    return [page, *pictures]


def _summary(results: Iterable[Mapping[str, Any]]) -> list[str]:
    goals = [
        (result["name"], label, figure)
        for result in results
        for label, figure in result["ratios"].items()
        if figure["holds"] is not None
    ]
    met = sum(figure["holds"] for _, _, figure in goals)
    rows = [
        f"| [{name}](#{name}) | {label} | {_median(figure)} | {figure['goal']} | {'yes' if figure['holds'] else 'no'} |"
        for name, label, figure in goals
    ]
    return [
        f"{met} of {len(goals)} goals are met.",
        "",
        "| benchmark | figure | median | goal | met |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


def _section(result: Mapping[str, Any], folder: Path, pictures: list[Path]) -> list[str]:
    name = result["name"]
    text = [f"## {name.capitalize()}", "", f"**{result['question']}**", ""]
    text += _documentation(name)
    ratios = {label: figure for label, figure in result["ratios"].items() if figure["unit"] == "×"}
    if result["series"]:
        path = folder / f"{name}.svg"
        plots.lines(result["question"], _panels(result["series"]), result["axes"][0], path)
    elif ratios:
        path = folder / f"{name}.svg"
        plots.bars(result["question"], ratios, path)
    else:
        path = None
    if path is not None:
        pictures.append(path)
        text += [f"![{result['question']}](benchmarks/{path.name})", ""]
    text += ["| figure | median | quartiles | samples | goal | met |", "|---|---|---|---|---|---|"]
    text += [
        f"| {label} | {_median(figure)} | {figure['low']:.3g} to {figure['high']:.3g} | {figure['samples']} "
        f"| {figure['goal'] or ''} | { {None: '', True: 'yes', False: 'no'}[figure['holds']] } |"
        for label, figure in result["ratios"].items()
    ]
    text += ["", *_details(result["details"]), *_where(result), ""]
    return text


def _documentation(name: str) -> list[str]:
    paragraphs = (importlib.import_module(f"benchmarks.{name}").__doc__ or "").strip().split("\n\n")[1:]
    return [line for part in paragraphs for line in (*textwrap.wrap(part, _WIDTH), "")]


def _details(details: Mapping[str, Any]) -> list[str]:
    if not details:
        return []
    body = [
        line
        for key, value in details.items()
        for line in (
            [f"{key}:", *(f"  {name:<32} {_plain(inner)}" for name, inner in value.items())]
            if isinstance(value, dict)
            else [f"{key}: {value}"]
        )
    ]
    return ["```text", *body, "```", ""]


def _plain(value: Any) -> str:
    return ", ".join(f"{name} {inner}" for name, inner in value.items()) if isinstance(value, dict) else str(value)


def _where(result: Mapping[str, Any]) -> list[str]:
    machine, versions = dict(result["machine"]), dict(result["versions"])
    load = machine["load_average"]
    sentence = (
        f"Measured {machine['measured']} on {machine['cores']} cores ({machine['processor']}, {machine['memory_gib']} "
        f"GiB, {machine['system']}), load average {load[0]} at the end; commit {versions.pop('commit')}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + "."
    )
    trial = ["", "A trial run: the figures say nothing."] if result["quick"] else []
    return [*textwrap.wrap(sentence, _WIDTH, break_long_words=False, break_on_hyphens=False), *trial]


def _panels(series: Mapping[str, list[list[float]]]) -> dict[str, dict[str, list[list[float]]]]:
    panels: dict[str, dict[str, list[list[float]]]] = {}
    for label, points in series.items():
        counted, _, side = label.rpartition(", ")
        panels.setdefault(counted, {})[side] = points
    return panels


def _median(figure: Mapping[str, Any]) -> str:
    return f"{figure['median']:.3g} {figure['unit']}"
