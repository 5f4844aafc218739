"""Writes the table of ``docs/settings.md``: ``python -m tests.docs.settings_page``.

The table is made from the settings themselves; a test fails while the page says something else.
"""

from __future__ import annotations

from tests.docs.tables import begin, replaced
from tests.support.paths import ROOT
from workerpools._celery.settings import all_settings

PAGE = ROOT / "docs" / "settings.md"
BEGIN = begin("settings_page")


def table() -> str:
    """Return the table, with a line for each setting."""
    rows = [
        f"| `{setting.key}` | `{setting.variable}` | {setting.meaning.replace('``', '`').rstrip('.')} |"
        for setting in all_settings()
    ]
    return "\n".join(["| in `app.conf` | in the environment | meaning (default) |", "|---|---|---|", *rows])


def written(text: str) -> str:
    """Return the page's text with its table as it should be."""
    return replaced(PAGE, text, BEGIN, table())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
