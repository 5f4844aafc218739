"""The site of the documentation: built without a warning, complete, and of its own files alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.markdown import pages
from tests.support.paths import ROOT

#: What makes a browser fetch something: not links, which a reader follows or does not.
_FETCHED = re.compile(
    r"<(?:script|img|iframe|source)[^>]* src=\"([^\"]+)\"|<link[^>]* href=\"([^\"]+)\"|url\(([^)]+)\)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `nox -s docs` does it."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.mark.slow
def test_every_page_is_there_in_its_group(site: Path) -> None:
    """The groups are the index's, and the README's; what is only for the tests is on no page."""
    start = (site / "docs" / "index.html").read_text(encoding="utf-8")
    captions = re.findall(r'<p class="caption"[^>]*><span class="caption-text">([^<]+)</span>', start)
    assert captions == re.findall(r"^- (\w+): ", (ROOT / "README.md").read_text(), re.MULTILINE)
    for page in pages():
        built = site / page.relative_to(ROOT).with_suffix(".html")
        text = built.read_text(encoding="utf-8")
        assert "&lt;!-- python" not in text, page.name
        assert "<!-- python" not in text, page.name
    assert "docs/index.html" in (site / "index.html").read_text()


@pytest.mark.slow
def test_nothing_comes_from_elsewhere(site: Path) -> None:
    """No font, script or picture of another server: whoever reads tells nobody."""
    fetched = set()
    for path in (*site.rglob("*.html"), *site.rglob("*.css")):
        for groups in _FETCHED.findall(path.read_text(encoding="utf-8")):
            fetched |= {"".join(groups).strip("'\"")}
    assert len(fetched) > 5
    assert [each for each in fetched if re.match(r"[a-z]+://|//", each)] == []
