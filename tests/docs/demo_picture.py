"""Draws ``docs/images/demo.svg``, the README's picture, from a run of the demo: ``python -m tests.docs.demo_picture``.

One file for light and dark pages: the style sheet follows the reader's preference, and the picture has a ground of its
own. A test fails while the demo's screen says something else.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

from rich.console import Console
from rich.text import Text

from tests.demo.running import DemoRun
from tests.support.paths import ROOT

PICTURE = ROOT / "docs" / "images" / "demo.svg"

_CONSOLE = Console()
_GREEN = 2  # of the eight colours that a terminal has by number
_COLUMN, _LINE, _MARGIN = 8.4, 19, 18
_STYLE = """\
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre }
.ground { fill: #f6f8fa; stroke: #d0d7de } .plain { fill: #1f2328 } .dim { fill: #59636e } .green { fill: #116329 }
.other { fill: #0550ae } .bold { font-weight: bold }
@media (prefers-color-scheme: dark) {
  .ground { fill: #0d1117; stroke: #3d444d } .plain { fill: #f0f6fc } .dim { fill: #9198a1 } .green { fill: #56d364 }
  .other { fill: #79c0ff }
}"""


def screen() -> list[str]:
    """Run the demo in a terminal; return the lines that stay on its screen, with their control sequences."""
    with tempfile.TemporaryDirectory() as folder, DemoRun("--once", cwd=Path(folder), terminal=True) as run:
        assert run.wait(600) == 0, run.text[-2000:]
        # What was drawn over is not there any more.
        lines = [re.split(r"\r|\x1b\[2K|\x1b\[1A", line.rstrip("\r"))[-1] for line in run.raw.split("\n")]
    plain = [Text.from_ansi(line).plain for line in lines]
    end = next(number for number, line in enumerate(plain) if line.startswith("Every process's connections"))
    # A spinner's last frame was on a line that another one has taken.
    kept = [line for line, said in zip(lines[: end - 1], plain, strict=False) if not re.match("[\u2801-\u28ff]", said)]
    return ["\x1b[2m$\x1b[0m ./demo --once", "", *kept]


def svg(lines: list[str]) -> str:
    """Return the picture of a terminal's lines."""
    drawn = [Text.from_ansi(line) for line in lines]
    width = round(2 * _MARGIN + _COLUMN * max(len(line.plain) for line in drawn))
    height = 2 * _MARGIN + _LINE * len(drawn)
    rows = [
        f'<text y="{_MARGIN + _LINE * number + 14}">{"".join(_spans(line))}</text>'
        for number, line in enumerate(drawn)
        if line.plain.strip()
    ]
    size = f'width="{width}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}">',
            f"<style>\n{_STYLE}\n</style>",
            f'<rect class="ground" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
            *rows,
            "</svg>\n",
        ]
    )


def _spans(line: Text) -> Iterator[str]:
    styles = [line.get_style_at_offset(_CONSOLE, column) for column in range(len(line.plain))]
    for match in re.finditer(r"\S+(?: \S+)*", line.plain):
        start = match.start()
        while start < match.end():
            end = start
            while end < match.end() and styles[end] == styles[start]:
                end += 1
            style = styles[start]
            color = None if style.color is None else style.color.number
            name = "dim" if style.dim else "plain" if color is None else "green" if color == _GREEN else "other"
            said = line.plain[start:end]
            # Its width is said outright: the columns stay in line whatever the reader's font is.
            yield (
                f'<tspan class="{name}{" bold" if style.bold else ""}" x="{_MARGIN + _COLUMN * start:.1f}"'
                f' textLength="{_COLUMN * len(said):.1f}" lengthAdjust="spacingAndGlyphs">{escape(said)}</tspan>'
            )
            start = end


def text(picture: str) -> list[str]:
    """Return what a picture says: each line's words, with a space between two pieces."""
    rows = re.findall(r"<text [^>]*>(.*)</text>", picture)
    pieces = [re.findall(r"<tspan [^>]*>([^<]*)</tspan>", row) for row in rows]
    return [re.sub(r"\s+", " ", " ".join(row)).strip() for row in pieces]


if __name__ == "__main__":
    PICTURE.write_text(svg(screen()), encoding="utf-8")
