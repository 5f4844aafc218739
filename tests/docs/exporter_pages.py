"""Writes the tables of ``docs/prometheus.md`` and ``docs/opentelemetry.md``: ``python -m tests.docs.exporter_pages``.

The tables are made from the definitions themselves; a test fails while the pages say something else.
"""

from __future__ import annotations

from pathlib import Path

from tests.docs.tables import begin, replaced
from tests.support.paths import ROOT
from workerpools._stats.metrics import DEFINITIONS
from workerpools.opentelemetry._conventions import ALERT, INSTRUMENTS, Instrument
from workerpools.prometheus import ALERT as ALERT_SERIES
from workerpools.prometheus import WorkerPoolsCollector

BEGIN = begin("exporter_pages")
PROMETHEUS = ROOT / "docs" / "prometheus.md"
OPENTELEMETRY = ROOT / "docs" / "opentelemetry.md"


def _series() -> list[str]:
    lines = ["| series | type | labels besides | meaning |", "|---|---|---|---|"]
    by_place = dict(enumerate(DEFINITIONS))
    for place, family in enumerate(WorkerPoolsCollector(dict).describe()):
        definition = by_place.get(place)
        if definition is None:
            labels = "`worker`, `resource`, `rule`" if family.name == ALERT_SERIES else "`worker` alone"
        else:
            values = ", ".join(f"`{value}`" for value in definition.values)
            labels = f"`{definition.label}`: {values}" if values else ""
        suffix = "_total" if family.type == "counter" else ""
        lines.append(f"| `{family.name}{suffix}` | {family.type} | {labels} | {family.documentation} |")
    return lines


def _metrics() -> list[str]:
    return [
        "| metric | instrument | unit | attributes besides | meaning |",
        "|---|---|---|---|---|",
        *(_metric(each) for each in (*INSTRUMENTS, ALERT)),
    ]


def _metric(each: Instrument) -> str:
    states: dict[str, list[str]] = {}
    for part in each.parts:
        if part.state is not None:
            states.setdefault(part.state[0], []).append(f"`{part.state[1]}`")
        if part.definition.values:
            states[f"workerpools.{part.definition.label}"] = [f"`{value}`" for value in part.definition.values]
    found = "; ".join(f"`{key}`: {', '.join(values)}" for key, values in states.items())
    if each is ALERT:
        found = "`workerpools.rule`"
    return f"| `{each.name}` | {each.form.value} | `{each.unit}` | {found} | {each.meaning} |"


def written(page: Path) -> str:
    """Return a page's text with its table as it should be."""
    table = "\n".join(_series() if page == PROMETHEUS else _metrics())
    return replaced(page, page.read_text(encoding="utf-8"), BEGIN, table)


if __name__ == "__main__":
    for path in (PROMETHEUS, OPENTELEMETRY):
        path.write_text(written(path), encoding="utf-8")
