"""`python -m benchmarks [NAME …] [--json] [--quick] [--save]`, `python -m benchmarks report`, and
`python -m benchmarks paths [--list]`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Figure
from benchmarks.result import FOLDER, Result
from benchmarks.servers import Servers, running

__all__ = ["NAMES", "main", "shown"]

NAMES = ("overhead", "throughput", "clients", "liveness", "recovery", "recycling", "startup", "scale")


def shown(figure: Figure) -> str:
    """Return a figure as text: the median, the quartiles, the unit, the goal and whether it holds."""
    text = f"{figure.median:.3g} {figure.unit} ({figure.low:.3g} to {figure.high:.3g})"
    return text if figure.goal is None else f"{text}, goal {figure.goal}: {'holds' if figure.holds else 'MISSED'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code: 1 where a path is over its budget."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Each benchmark answers one question.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; report or paths")
    parser.add_argument("--json", action="store_true", help="print JSON, a line each, and nothing else")
    parser.add_argument("--quick", action="store_true", help="a trial of a few seconds, whose figures say nothing")
    parser.add_argument("--save", action="store_true", help="keep the results for the report")
    parser.add_argument("--list", action="store_true", help="paths: print each frame, too")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where results are kept")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - {*NAMES, "paths", "report"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(NAMES)}, paths, report")
    names = [name for name in options.names if name in NAMES] or ([] if options.names else list(NAMES))
    modules = [importlib.import_module(f"benchmarks.{name}") for name in names]
    within_budget = True
    with ExitStack() as stack:
        servers: Servers | None = None
        if "paths" in options.names or any(module.NEEDS_SERVERS for module in modules):
            servers = stack.enter_context(running())
        for module in modules:
            result: Result = module.run(servers, quick=options.quick)
            if options.save:
                result.save(options.folder)
            if options.json:
                print(json.dumps(result.as_json(), ensure_ascii=False), flush=True)
            else:
                _print(result)
        if "paths" in options.names:
            assert servers is not None
            within_budget = _count_paths(servers, as_json=options.json, listed=options.list)
    if "report" in options.names:
        from benchmarks.report import write

        for path in write(options.folder):
            print(path)
    return 0 if within_budget else 1


def _count_paths(servers: Servers, *, as_json: bool, listed: bool) -> bool:
    from benchmarks import paths

    ways = paths.measure(servers)
    if as_json:
        for way in ways:
            told = {"name": way.name, **way.counts, "over": way.over}
            print(json.dumps({**told, "steps": way.lines()} if listed else told), flush=True)
    else:
        paths.show(ways, listed=listed)
    return not any(way.over for way in ways)


def _print(result: Result) -> None:
    console = Console()
    table = Table("figure", "median", "quartiles", "goal", "holds", title=result.question, title_justify="left")
    for label, figure in result.ratios.items():
        table.add_row(
            label,
            f"{figure.median:.3g} {figure.unit}",
            f"{figure.low:.3g} to {figure.high:.3g}",
            str(figure.goal or ""),
            {None: "", True: "yes", False: "[bold]no[/bold]"}[figure.holds],
        )
    console.print(table)
    label, figure = list(result.ratios.items())[-1]
    console.print(f"{result.name}: {label}: {shown(figure)}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
