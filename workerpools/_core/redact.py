"""Keeps secrets out of what people read."""

from __future__ import annotations

import re

__all__ = ["redact_text", "redact_url"]

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
