"""Text for people: redaction, suggestions for misspelled names, exception notes, missing extras."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["add_note", "explained", "meant", "redact_text", "redact_url", "refusal"]

# Compiled on first use and cached by re: few processes print a URL.
# Greedy: the last "@" ends the user information, because an unescaped password may contain others.
_USER_INFO = r"(?s)(?P<scheme>[\w+.\-]+://)?(?P<info>.*)@(?P<rest>[^@]*)"
# A user name that cannot be mistaken for anything else.
_USER = r"[^:/@?#\s]*"
_QUERY = r"(?s)[?#].*$"
# The user information of each URL in a text; again the last "@" ends it.
_IN_TEXT = r"://[^\s]*@"


def redact_url(url: str) -> str:
    """Return ``url`` without its password, its query and its fragment.

    Invalid URLs are redacted, too: everything before the last ``@`` is hidden, except for a user name followed by a
    password. A user name without a password may be a token.
    """
    match = re.fullmatch(_USER_INFO, url)
    if match is None:
        return re.sub(_QUERY, "", url)
    user, _, password = match["info"].partition(":")
    shown = f"{user}:" if password and re.fullmatch(_USER, user) else ""
    return f"{match['scheme'] or ''}{shown}***@{re.sub(_QUERY, '', match['rest'])}"


def redact_text(text: str) -> str:
    """Return ``text`` with the user information of every URL in it hidden."""
    # The cheap test first: this runs for every log line, and few contain a URL.
    return re.sub(_IN_TEXT, "://***@", text) if "://" in text and "@" in text else text


#: The least similarity of a suggestion, from 0 to 1: difflib's default.
ALIKE = 0.6


def meant(name: str, known: Iterable[str], alike: float = ALIKE) -> str | None:
    """Return the known name most similar to ``name``; None if none is similar enough.

    Args:
        name: A misspelled name.
        known: The existing names.
        alike: The least similarity, from 0 to 1.
    """
    # Imported late: only mistakes need it.
    from difflib import get_close_matches

    return next(iter(get_close_matches(name, known, 1, alike)), None)


def refusal(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Return the unknown names, each with a suggestion, for an error message.

    Args:
        unknown: The names that do not exist.
        known: The existing names.
    """
    known = list(known)
    shown = []
    for name in sorted(unknown):
        nearest = meant(name, known)
        shown.append(name if nearest is None else f"{name} (did you mean {nearest}?)")
    return ", ".join(shown)


def add_note(error: BaseException, note: str) -> None:
    """Add ``note`` to ``error``, as in PEP 678; on Python 3.10 as a plain attribute ``__notes__``.

    Adding the same note twice has no effect.

    Args:
        error: The exception.
        note: One or more lines of text, without secrets.
    """
    notes = getattr(error, "__notes__", None)
    if notes is None:
        notes = []
    if note in notes:
        return
    try:
        error.__notes__ = [*notes, note]
    except Exception:  # an exception class without a __dict__: the error matters more than the note
        return


def explained(
    error: ModuleNotFoundError, module: str, library: str, extra: str, distribution: str = ""
) -> ModuleNotFoundError:
    """Return a replacement for ``error`` that names the missing extra.

    Args:
        error: The error from importing ``library``.
        module: The module that needs the library.
        library: The top-level module that was imported.
        extra: The extra that installs it.
        distribution: The distribution to install; ``library`` if empty.

    Returns:
        The error to raise: ``error`` itself if another module is missing, such as a dependency of the library.
    """
    if error.name != library:
        return error
    return ModuleNotFoundError(
        f"{module} needs {library}, which the extra {extra!r} brings: pip install {distribution or library}",
        name=error.name,
        path=error.path,
    )
