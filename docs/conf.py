"""Sphinx's configuration of the site: ``nox -s docs`` builds it. Its pages are the Markdown that GitHub shows, too.

The source directory is the checkout, so that a link leads to the same file here as there. The index says which pages
there are, and in which group.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

project = "workerpools"
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**"]
# Not looked into: they are large.
exclude_patterns = [".*", "benchmarks", "build", "demo_tasks", "dist", "site", "tests", "workerpools"]
extensions = ["myst_parser"]
# Headings have the anchors that GitHub gives them.
myst_heading_anchors = 4

html_theme = "furo"
# Furo's own styles show a diff in one colour.
pygments_style = "default"
pygments_dark_style = "monokai"
html_title = "workerpools"
html_theme_options = {
    "source_repository": "https://github.com/workerpools/workerpools/",
    "source_branch": "main",
    "source_directory": "",
}
html_copy_source = False
html_show_sphinx = False

_HIDDEN = re.compile(r"^<!-- .*?-->\n", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\((?P<page>[\w./-]+)\.md(?:#[\w-]+)?\)")


def groups(index: str) -> dict[str, list[str]]:
    """Return the pages of each group, in the index's order, as paths from the checkout's root.

    Args:
        index: The text of ``docs/index.md``.
    """
    found: dict[str, list[str]] = {}
    for section in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        pages = dict.fromkeys(match["page"] for match in _LINK.finditer(text))
        found[title] = [page[3:] if page.startswith("../") else f"docs/{page}" for page in pages]
    return found


def _read(app: Any, name: str, source: list[str]) -> None:
    text = source[0]
    if name == root_doc:
        for title, pages in groups(text).items():
            entries = "\n".join(f"/{page}" for page in pages)
            text += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{entries}\n```\n"
    # Only the tests read them.
    source[0] = _HIDDEN.sub("", text)


def _finish(app: Any, exception: Exception | None) -> None:
    if exception is None:
        start = (
            '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html"><title>workerpools</title>\n'
        )
        Path(app.outdir, "index.html").write_text(start, encoding="utf-8")


def setup(app: Any) -> None:
    """Add the groups to the index, and a first page that leads to it."""
    app.connect("source-read", _read)
    app.connect("build-finished", _finish)
