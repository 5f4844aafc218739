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
# The rest of each URL in a text, without the punctuation that follows it.
_REST_IN_TEXT = r"""(?P<scheme>[\w+.\-]+://)(?P<rest>[^\s]*?)(?=['")\]>.,;:]*(?:\s|$))"""
# Schemes whose path is not the name of a database.
_WEB = r"(?i)https?\b"
# The parts of such a path that are surely not tokens. Webhooks and bots have theirs there.
_PLAIN = r"|api|rest|graphql|v\d{1,2}(?:\.\d{1,2})?"
# The same of a URL in a text, which need not be one of ours: plain words are not, either.
_PLAIN_IN_TEXT = _PLAIN + r"|[a-z]{1,15}"


def redact_url(url: str) -> str:
    """Return ``url`` without its password, its query, its fragment and, with http and https, what of its path may be a
    token.

    Invalid URLs are redacted, too: everything before the last ``@`` is hidden, except for a user name followed by a
    password. A user name without a password may be a token.

    Args:
        url: Any text.
    """
    match = re.fullmatch(_USER_INFO, url)
    if match is None:
        scheme, separator, rest = url.rpartition("://")
        return f"{scheme}{separator}{_redact_rest(scheme, rest)}"
    user, _, password = match["info"].partition(":")
    shown = f"{user}:" if password and re.fullmatch(_USER, user) else ""
    scheme = match["scheme"] or ""
    return f"{scheme}{shown}***@{_redact_rest(scheme, match['rest'])}"


def _redact_rest(scheme: str, rest: str, plain: str = _PLAIN) -> str:
    """Return what follows the user information of a URL, without secrets."""
    host, *path = re.sub(_QUERY, "", rest).split("/")
    if re.match(_WEB, scheme):
        path = [part if re.fullmatch(plain, part) else "***" for part in path]
    return "/".join((host, *path))


def redact_text(text: str) -> str:
    """Return ``text`` with every URL in it as :func:`redact_url` shows it, also without the name of its user."""
    # The cheap test first: this runs for every log line, and few contain a URL.
    if "://" not in text:
        return text
    text = re.sub(_IN_TEXT, "://***@", text) if "@" in text else text
    return re.sub(_REST_IN_TEXT, _redact_match, text)


def _redact_match(match: re.Match[str]) -> str:
    return f"{match['scheme']}{_redact_rest(match['scheme'], match['rest'], _PLAIN_IN_TEXT)}"


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
