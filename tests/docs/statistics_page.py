"""Writes the table of ``docs/statistics.md``: ``python -m tests.docs.statistics_page``.

The table is made from the definitions themselves; a test fails while the page says something else.
"""

from __future__ import annotations

from tests.support.paths import ROOT
from workerpools._core.counters import DEFINITIONS, Definition

PAGE = ROOT / "docs" / "statistics.md"
BEGIN = "<!-- The table is written by `python -m tests.docs.statistics_page`. -->"
END = "<!-- End of the table. -->"


def table() -> str:
    """Return the table, with a line for each definition."""
    return "\n".join(["| name | kind | unit | meaning |", "|---|---|---|---|", *map(_line, DEFINITIONS)])


def _line(definition: Definition) -> str:
    labels = ", ".join(f"`{value}`" for value in definition.values)
    by = f" By {definition.label}: {labels}." if labels else ""
    return f"| `{definition.name}` | {definition.kind.value} | {definition.unit} | {definition.meaning}{by} |"


def written(text: str) -> str:
    """Return the page's text with its table as it should be."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{PAGE}: the table's two marks are not there")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
