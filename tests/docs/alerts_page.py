"""Writes the table of ``docs/alerts.md``: ``python -m tests.docs.alerts_page``.

The table is made from the rules themselves; a test fails while the page says something else.
"""

from __future__ import annotations

from tests.support.paths import ROOT
from workerpools._core.rules import RULES, Rule

PAGE = ROOT / "docs" / "alerts.md"
BEGIN = "<!-- The table is written by `python -m tests.docs.alerts_page`. -->"
END = "<!-- End of the table. -->"


def table() -> str:
    """Return the table, with a line for each rule."""
    head = "| rule | about | raised when | well again when | unit | settings |\n|---|---|---|---|---|---|"
    return "\n".join([head, *map(_line, RULES)])


def _line(rule: Rule) -> str:
    settings = ", ".join(f"`workerpools_{name}`" for name in rule.settings)
    cells = (f"`{rule.name}`", f"a {rule.subject}", rule.meaning, rule.clears, rule.unit, settings)
    return "| " + " | ".join(cells) + " |"


def written(text: str) -> str:
    """Return the page's text with its table as it should be."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{PAGE}: the table's two marks are not there")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
