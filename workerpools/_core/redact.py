"""Keeps secrets out of what people read."""

from __future__ import annotations

import re

__all__ = ["redact_url"]

# Greedy: the last "@" ends the user information, since a password that was not escaped may hold others.
_USER_INFO = re.compile(r"(?P<scheme>[\w+.\-]+://)?(?P<info>.*)@(?P<rest>[^@]*)", re.DOTALL)
# What may stand for a user and for nothing else.
_USER = re.compile(r"[^:/@?#\s]*")
_QUERY = re.compile(r"[?#].*$", re.DOTALL)


def redact_url(url: str) -> str:
    """Return ``url`` without its password, its query and its fragment.

    Works on text that is no valid URL, too: all before the last ``@`` is hidden, but for a user's name with a password
    after it. Without one it may be a token.
    """
    match = _USER_INFO.fullmatch(url)
    if match is None:
        return _QUERY.sub("", url)
    user, _, password = match["info"].partition(":")
    shown = f"{user}:" if password and _USER.fullmatch(user) else ""
    return f"{match['scheme'] or ''}{shown}***@{_QUERY.sub('', match['rest'])}"
