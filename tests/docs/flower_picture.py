"""Takes ``docs/images/flower-pools.webp`` from a run of the demo: ``python -m tests.docs.flower_picture``.

One file for light and dark pages: the page has a ground of its own.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from tests.demo.running import DemoRun
from tests.support.browser import Browser
from tests.support.paths import ROOT

PICTURE = ROOT / "docs" / "images" / "flower-pools.webp"

#: What fits a page of the docs, and shows a process below the whole worker.
_WIDTH, _HEIGHT = 1440, 1250
#: Several points of each line.
_REFRESHES = 6
_LOAD = ("--tasks", "1000", "--concurrency", "2")


def take(address: str, picture: Path) -> None:
    """Open the page, ask the servers, and take the picture while the tasks run."""
    with Browser() as browser:
        browser.size(_WIDTH, _HEIGHT)
        browser.media(prefers_color_scheme="light", prefers_reduced_motion="reduce")
        browser.open(address)
        browser.until("!document.getElementById('wp-servers').hidden")
        browser.evaluate("document.getElementById('wp-ask').click()")
        browser.until("document.getElementById('wp-servers-asked').innerText.startsWith('Asked ')")
        browser.until(f"document.querySelector('.wp-spark-line').getAttribute('d').split('L').length >= {_REFRESHES}")
        browser.screenshot(picture, whole=False)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    with tempfile.TemporaryDirectory() as folder, DemoRun(*_LOAD, cwd=Path(folder)) as run:
        run.wait_for("connections cut", 600)
        found = re.search(r"^Flower +(http://\S+)", run.text, re.MULTILINE)
        assert found is not None, run.text
        take(f"{found[1]}/pools", target)
