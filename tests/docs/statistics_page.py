"""Writes the table of ``docs/statistics.md``: ``python -m tests.docs.statistics_page``.

The table is made from the definitions themselves; a test fails while the page says something else.
"""

from __future__ import annotations

from tests.docs.tables import begin, replaced
from tests.support.paths import ROOT
from workerpools._stats.metrics import DEFINITIONS, Definition

PAGE = ROOT / "docs" / "statistics.md"
BEGIN = begin("statistics_page")


def table() -> str:
    """Return the table, with a line for each definition."""
    return "\n".join(["| name | kind | unit | meaning |", "|---|---|---|---|", *map(_line, DEFINITIONS)])


def _line(definition: Definition) -> str:
    labels = ", ".join(f"`{value}`" for value in definition.values)
    by = f" By {definition.label}: {labels}." if labels else ""
    return f"| `{definition.name}` | {definition.type.value} | {definition.unit} | {definition.meaning}{by} |"


def written(text: str) -> str:
    """Return the page's text with its table as it should be."""
    return replaced(PAGE, text, BEGIN, table())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
