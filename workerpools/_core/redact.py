"""Keeps secrets out of what people read."""

from __future__ import annotations

import re

__all__ = ["redact_url"]

_USER_INFO = re.compile(r"(?P<scheme>[\w+.\-]+://|^)(?P<user>[^:/@\s]*):(?P<password>.*)@(?P<rest>[^@]*)$", re.DOTALL)
_QUERY = re.compile(r"[?#].*$", re.DOTALL)


def redact_url(url: str) -> str:
    """Return ``url`` without its password, its query and its fragment.

    Works on text that is no valid URL, too: what stands between the first colon of the user information and the last
    ``@`` is taken for the password.
    """
    # The user information goes first: a password may contain a question mark that was not escaped.
    shown = _USER_INFO.sub(r"\g<scheme>\g<user>:***@\g<rest>", url)
    return _QUERY.sub("", shown)
