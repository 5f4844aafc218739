"""Which name was meant by one that does not exist."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["meant", "refusal"]

#: How alike two names are to be, from 0 to 1: difflib's own default.
ALIKE = 0.6


def meant(name: str, known: Iterable[str], alike: float = ALIKE) -> str | None:
    """Return the name of ``known`` that is most like ``name``; None if none is."""
    # Of use to mistakes alone.
    from difflib import get_close_matches

    return next(iter(get_close_matches(name, known, 1, alike)), None)


def refusal(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Return the names that do not exist, each with the one that was meant, for a message."""
    known = list(known)
    shown = []
    for name in sorted(unknown):
        nearest = meant(name, known)
        shown.append(name if nearest is None else f"{name} (did you mean {nearest}?)")
    return ", ".join(shown)
