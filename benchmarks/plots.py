"""Plots of the results, as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["bars", "lines"]

_GOOD, _BAD, _NEUTRAL = "#2a7f4f", "#b5442e", "#7d8794"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    # The same input gives the same file: no date, no random ids.
    matplotlib.rcParams.update({"svg.hashsalt": "workerpools", "svg.fonttype": "path", "font.size": 9})
    import matplotlib.pyplot as plt

    return plt


def bars(title: str, figures: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw a benchmark's ratios as bars with their quartiles; a line at 1.

    Args:
        title: Above the plot.
        figures: The JSON of figures whose unit is ×, by label.
        path: Where to write the SVG.
    """
    plt = _pyplot()
    drawn, axes = plt.subplots(figsize=(8, 0.9 + 0.34 * len(figures)))
    labels = list(figures)[::-1]
    values = [figures[label] for label in labels]
    colours = [{True: _GOOD, False: _BAD, None: _NEUTRAL}[value["holds"]] for value in values]
    spread = [
        [max(0.0, value["median"] - value["low"]) for value in values],
        [max(0.0, value["high"] - value["median"]) for value in values],
    ]
    axes.barh(labels, [value["median"] for value in values], xerr=spread, color=colours, height=0.6)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("ratio (median and quartiles)")
    _finish(plt, drawn, axes, title, path)


def lines(title: str, panels: Mapping[str, Mapping[str, list[list[float]]]], across: str, path: Path) -> None:
    """Draw lines, a panel for each thing that is counted.

    Args:
        title: Above the plot.
        panels: By what is counted: points (x, y) by the line's label.
        across: What x is.
        path: Where to write the SVG.
    """
    plt = _pyplot()
    drawn, all_axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3), squeeze=False)
    for axes, (counted, series) in zip(all_axes[0], panels.items(), strict=True):
        for label, points in series.items():
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(across)
        axes.set_title(counted)
        axes.legend(frameon=False)
    _finish(plt, drawn, None, title, path)


def _finish(plt: Any, drawn: Any, axes: Any, title: str, path: Path) -> None:
    if axes is None:
        drawn.suptitle(title)
    else:
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    drawn.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, format="svg", metadata={"Date": None})
    plt.close(drawn)
    # matplotlib ends lines with a blank here and there.
    text = "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines())
    path.write_text(text + "\n", encoding="utf-8")
