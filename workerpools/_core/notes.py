"""Adds a sentence to somebody else's exception without changing the exception."""

from __future__ import annotations

__all__ = ["add_note"]


def add_note(error: BaseException, note: str) -> None:
    """Add ``note`` to ``error`` as PEP 678 does; on Python 3.10 as the plain attribute ``__notes__``.

    A note that stands there already is not added again.
    """
    notes = getattr(error, "__notes__", None)
    if notes is None:
        notes = []
    if note in notes:
        return
    try:
        error.__notes__ = [*notes, note]
    except Exception:  # an exception class without a __dict__: the error matters more than our note
        return
