"""Findings that the user leaves out, each with a reason."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Collection, Iterable, Iterator, Mapping

from workerpools._check.findings import Code, Finding
from workerpools._pools.settings import PREFIX

__all__ = ["CODES", "SETTING", "in_setting", "in_source", "left"]

#: The setting that leaves codes out.
SETTING = f"{PREFIX}check_ignore"

_COMMENT = re.compile(r"#\s*workerpools:\s*ignore\[(?P<codes>[^\]]*)\]\s*(?P<reason>[^#]*)")

WITHOUT_REASON = Code(
    "WP001",
    "warning",
    "A code is ignored without a reason",
    "Nobody can tell later whether the finding was judged or just silenced.",
    "Say why, in a few words.",
    "http = httpx.Client()  # workerpools: ignore[WP104]",
)
UNKNOWN = Code(
    "WP002",
    "error",
    "An ignored code does not exist",
    "A mistyped or removed code ignores nothing.",
    "Use a code listed in docs/check.md, or remove it.",
    'workerpools_check_ignore = {"WP999": "…"}',
)
CODES = (WITHOUT_REASON, UNKNOWN)


def in_setting(reasons: Mapping[str, str], known: Collection[str]) -> Iterator[Finding]:
    """Yield what is wrong with the codes that the setting leaves out.

    Args:
        reasons: The setting.
        known: Every code.
    """
    for code, reason in reasons.items():
        yield from _wrong(SETTING, code, reason, known)


def in_source(path: str, text: str, known: Collection[str]) -> tuple[dict[int, frozenset[str]], list[Finding]]:
    """Return the codes left out by comments, by line, and what is wrong with them.

    Args:
        path: The file, as findings name it.
        text: Its source.
        known: Every code.
    """
    silenced: dict[int, frozenset[str]] = {}
    wrong: list[Finding] = []
    if "workerpools:" not in text:
        return silenced, wrong
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        match = _COMMENT.match(token.string) if token.type == tokenize.COMMENT else None
        if match is None:
            continue
        line = token.start[0]
        codes = [code.strip() for code in match["codes"].split(",")]
        for code in codes:
            wrong += _wrong(f"{path}:{line}", code, match["reason"], known)
        silenced[line] = frozenset(codes) if match["reason"].strip() else frozenset()
    return silenced, wrong


def _wrong(where: str, code: str, reason: str, known: Collection[str]) -> Iterator[Finding]:
    if code not in known:
        yield UNKNOWN.at(where, f"there is no code {code!r}")
    elif not reason.strip():
        yield WITHOUT_REASON.at(where, f"{code} is left out without a reason, and so is not left out")


def left(
    findings: Iterable[Finding], reasons: Mapping[str, str], silenced: Mapping[str, frozenset[str]]
) -> list[Finding]:
    """Return the findings that nobody left out.

    Args:
        findings: What was found.
        reasons: The setting.
        silenced: The codes left out at a place, by ``file:line``.
    """
    left_out = {code for code, reason in reasons.items() if reason.strip()}
    return [each for each in findings if each.code not in left_out | silenced.get(each.where, frozenset())]
