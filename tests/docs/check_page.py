"""Writes the table of ``docs/check.md``: ``python -m tests.docs.check_page``.

The table is made from the codes themselves; a test fails while the page says something else.
"""

from __future__ import annotations

from tests.docs.tables import begin, replaced
from tests.support.paths import ROOT
from workerpools._check.codes import ALL

PAGE = ROOT / "docs" / "check.md"
BEGIN = begin("check_page")


def table() -> str:
    """Return the table, with a line for each code."""
    rows = [f"| `{code}` | {each.severity} | {each.title} | {_cell(each.fix)} |" for code, each in sorted(ALL.items())]
    return "\n".join(["| code | severity | what is found | what to do |", "|---|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("…", "...")


def written(text: str) -> str:
    """Return the page's text with its table as it should be."""
    return replaced(PAGE, text, BEGIN, table())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
