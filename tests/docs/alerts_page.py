"""Writes the table of ``docs/alerts.md``: ``python -m tests.docs.alerts_page``.

The table is made from the rules themselves; a test fails while the page says something else.
"""

from __future__ import annotations

from tests.docs.tables import begin, replaced
from tests.support.paths import ROOT
from workerpools._stats.rules import RULES, Rule

PAGE = ROOT / "docs" / "alerts.md"
BEGIN = begin("alerts_page")


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
    return replaced(PAGE, text, BEGIN, table())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
