"""The code blocks of a Markdown page: those that readers see, and those that only prepare or check something."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

# What a fence may be marked with. "text" is what a program prints: hidden blocks compare it with the real thing.
LANGUAGES = frozenset(("diff", "python", "sh", "sql", "text", "yaml"))

_FENCE = re.compile(r"^```(?P<language>\S*)\s*$")
_HIDDEN = "<!-- python"
_HIDDEN_END = "-->"


class PageError(AssertionError):
    """A page is not written as the tests can check it; the message names the page and the line."""


@dataclass(frozen=True)
class Block:
    """One block of code.

    Attributes:
        page: The page's path from the checkout's root.
        line: The line of its fence, counted from 1; its text begins on the next one.
        language: What the fence is marked with.
        text: What is between the fences.
        hidden: Whether it stands in an HTML comment.
    """

    page: str
    line: int
    language: str
    text: str
    hidden: bool = False

    @property
    def file_name(self) -> str | None:
        """The file that the block is the text of, if its first line says so: ``# shop.py``, ``# shop/settings.py``."""
        first = self.text.partition("\n")[0]
        match = re.match(r"# (\w+(?:/\w+)*\.py)$", first[1:] if self.language == "diff" else first)
        return match[1] if match else None

    @property
    def before(self) -> str:
        """What a block marked ``diff`` is a change of."""
        return self._side("-")

    @property
    def after(self) -> str:
        """What a block marked ``diff`` makes of it."""
        return self._side("+")

    def _side(self, sign: str) -> str:
        return "".join(line[1:] or "\n" for line in self.text.splitlines(keepends=True) if line[0] in f" \n{sign}")


def pages() -> list[Path]:
    """Return every page of the documentation, README first."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def blocks(path: Path) -> list[Block]:
    """Return the blocks of a page, in the order in which they stand.

    Raises:
        PageError: A fence is indented, not closed, or marked with something that nobody would run.
    """
    page = path.relative_to(ROOT).as_posix()
    return list(_blocks(page, path.read_text(encoding="utf-8").splitlines()))


def _blocks(page: str, lines: list[str]) -> Iterator[Block]:
    numbered = iter(enumerate(lines, start=1))
    for number, line in numbered:
        fence = _FENCE.match(line)
        hidden = line == _HIDDEN
        if fence is None and not hidden:
            if line.lstrip().startswith(("```", "~~~", "<!-- python", "<pre", "    >>>")):
                raise PageError(f"{page}:{number}: a block that no test would find: {line!r}")
            continue
        language = "python" if hidden else fence["language"] if fence else ""
        if language not in LANGUAGES:
            raise PageError(f"{page}:{number}: a block is marked {language!r}; known: {', '.join(sorted(LANGUAGES))}")
        text: list[str] = []
        for _, inner in numbered:
            if inner == (_HIDDEN_END if hidden else "```"):
                break
            text.append(inner)
        else:
            raise PageError(f"{page}:{number}: the block has no end")
        yield Block(page, number, language, "\n".join(text) + "\n", hidden)
