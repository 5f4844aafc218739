"""What people read: secrets hidden, suggestions for misspelled names, notes on exceptions, missing extras."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["add_note", "explained", "meant", "redact_text", "redact_url", "refusal"]

# Compiled when they are needed, and kept by re: few processes show a URL.
# Greedy: the last "@" ends the user information, since a password that was not escaped may hold others.
_USER_INFO = r"(?s)(?P<scheme>[\w+.\-]+://)?(?P<info>.*)@(?P<rest>[^@]*)"
# What may stand for a user and for nothing else.
_USER = r"[^:/@?#\s]*"
_QUERY = r"(?s)[?#].*$"
# The user information of each URL in a text; the last "@" ends it here, too.
_IN_TEXT = r"://[^\s]*@"


def redact_url(url: str) -> str:
    """Return ``url`` without its password, its query and its fragment.

    Works on text that is no valid URL, too: all before the last ``@`` is hidden, but for a user's name with a password
    after it. Without one it may be a token.
    """
    match = re.fullmatch(_USER_INFO, url)
    if match is None:
        return re.sub(_QUERY, "", url)
    user, _, password = match["info"].partition(":")
    shown = f"{user}:" if password and re.fullmatch(_USER, user) else ""
    return f"{match['scheme'] or ''}{shown}***@{re.sub(_QUERY, '', match['rest'])}"


def redact_text(text: str) -> str:
    """Return ``text`` with the user information of every URL in it hidden."""
    # Looked for first: few texts have any, and this is asked for each line of a log.
    return re.sub(_IN_TEXT, "://***@", text) if "://" in text and "@" in text else text


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


def explained(
    error: ModuleNotFoundError, module: str, library: str, extra: str, distribution: str = ""
) -> ModuleNotFoundError:
    """Return the error to raise instead of ``error``: one that says what to install.

    Args:
        error: What importing ``library`` raised.
        module: The module of ours that needs it.
        library: The top-level module that was imported.
        extra: The extra that brings it.
        distribution: What to install, where that has another name than ``library``.

    Returns:
        ``error`` itself where something else is missing, such as what the library needs in its turn.
    """
    if error.name != library:
        return error
    return ModuleNotFoundError(
        f"{module} needs {library}, which the extra {extra!r} brings: pip install {distribution or library}",
        name=error.name,
        path=error.path,
    )
