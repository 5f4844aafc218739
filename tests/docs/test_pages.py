"""Every block of the documentation is executed, against real servers."""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from bisect import bisect
from pathlib import Path

import pytest

from tests.docs.markdown import Block, PageError, _blocks, blocks, pages
from tests.support.paths import ROOT

README = ROOT / "README.md"


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.worker
@pytest.mark.timeout(170)
@pytest.mark.parametrize("page", pages(), ids=_name)
def test_every_block_runs(page: Path, page_environment: dict[str, str], tmp_path: Path) -> None:
    """The blocks run one after the other, and as many were executed as a plain search finds in the page."""
    if page.name == "httpx2.md" and sys.version_info < (3, 11):
        pytest.skip("httpx2 needs Python 3.11")
    report = tmp_path / "executed.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.docs.runner", str(page), str(report)],
        cwd=tmp_path,
        env=page_environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=150)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, f"{_name(page)} failed:\n{output}"
    # Found without the parser that the runner uses: what the parser overlooks must not go unnoticed.
    found = len(re.findall(r"^\s*(?:```(?:diff|python|sh|sql|yaml)|<!-- python)\s*$", page.read_text(), re.MULTILINE))
    assert len(json.loads(report.read_text())) == found


@pytest.mark.parametrize("page", pages(), ids=_name)
def test_code_is_formatted(page: Path) -> None:
    """A visible block is short enough to be read without scrolling, and parses on its own."""
    for block in blocks(page):
        long = [line for line in block.text.splitlines() if len(line) > (120 if block.hidden else 110)]
        assert not long, f"{block.page}:{block.line}: {long}"
        for text in _sides(block):
            compile(text, f"{block.page}:{block.line}", "exec")


@pytest.mark.parametrize("page", pages(), ids=_name)
def test_visible_code_uses_no_helper_of_the_tests(page: Path) -> None:
    """Nobody who reads it has them."""
    for block in blocks(page):
        for text in () if block.hidden else _sides(block):
            names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
            helpers = {"sql", "log", "stop", "sh", "run_before", "shown", "eventually", "PAGE"}
            assert not names & helpers, f"{block.page}:{block.line}"


def _sides(block: Block) -> tuple[str, ...]:
    """The Python texts of a block."""
    return {"python": (block.text,), "diff": (block.before, block.after)}.get(block.language, ())


def test_readme_can_be_pasted() -> None:
    """A file needs nothing else; what is pasted has what it uses, or the same section has shown it before."""
    headings = [number for number, line in enumerate(README.read_text().splitlines(), 1) if line.startswith("## ")]
    pasted: dict[int, set[str]] = {}
    for block in blocks(README):
        if block.language != "python" or block.hidden:
            continue
        known = set() if block.file_name else pasted.setdefault(bisect(headings, block.line), set())
        tree = ast.parse(block.text)
        known |= _bound(tree)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not used - known - set(dir(builtins)), f"{block.page}:{block.line}"


def _bound(tree: ast.Module) -> set[str]:
    """Every name that is given a value, wherever."""
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    return bound


@pytest.mark.parametrize(
    "lines",
    [
        ["  ```python", "x = 1", "  ```"],
        ["~~~python", "x = 1", "~~~"],
        ["```py", "x = 1", "```"],
        ["```", "x = 1", "```"],
        ["```python", "x = 1"],
        ["<!-- python: -->"],
        ["``` python", "x = 1", "```"],
    ],
)
def test_block_that_would_not_run_is_refused(lines: list[str]) -> None:
    """A block in another notation fails the tests, rather than being passed over."""
    with pytest.raises(PageError):
        list(_blocks("page.md", lines))


def test_blocks_are_found() -> None:
    """The parser tells visible blocks from hidden ones, and knows their lines."""
    lines = ["text", "```python", "x = 1", "```", "<!-- python", "assert x", "-->"]
    assert list(_blocks("page.md", lines)) == [
        Block("page.md", 2, "python", "x = 1\n"),
        Block("page.md", 5, "python", "assert x\n", hidden=True),
    ]


def test_sides_of_a_diff() -> None:
    """Unchanged lines, empty ones among them, are in both."""
    block = Block("page.md", 1, "diff", " # shop.py\n-import requests\n+import httpx\n\n print(1)\n")
    assert block.file_name == "shop.py"
    assert block.before == "# shop.py\nimport requests\n\nprint(1)\n"
    assert block.after == "# shop.py\nimport httpx\n\nprint(1)\n"
