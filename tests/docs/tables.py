"""Tables of the documentation that are made from the code."""

from __future__ import annotations

from pathlib import Path

END = "<!-- End of the table. -->"


def begin(module: str) -> str:
    """Return the mark before the table that ``python -m tests.docs.<module>`` writes."""
    return f"<!-- The table is written by `python -m tests.docs.{module}`. -->"


def replaced(page: Path, text: str, mark: str, table: str) -> str:
    """Return a page's text with its table as it should be.

    Args:
        page: The page, for the message.
        text: Its text.
        mark: What :func:`begin` returned.
        table: The table.
    """
    before, _, rest = text.partition(mark)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{page}: the table's two marks are not there")
    return f"{before}{mark}\n\n{table}\n\n{END}{after}"
