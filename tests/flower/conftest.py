"""Fixtures of the tests that run a real Flower, and look at it with a real browser."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from demo_tasks.servers import Workspace
from tests.support.browser import Browser, browser_program
from tests.support.flower import FlowerProcess
from tests.support.services import require_program


@pytest.fixture(scope="session")
def browser(_clean_session: None) -> Iterator[Browser]:
    """A browser for the session."""
    require_program(browser_program)
    with Browser() as opened:
        yield opened


@pytest.fixture
def page(browser: Browser) -> Iterator[Browser]:
    """The browser as it is when it starts."""
    browser.size(1280, 900)
    browser.media(prefers_color_scheme="light", prefers_reduced_motion="no-preference")
    browser.send("Network.setExtraHTTPHeaders", {"headers": {}})
    yield browser
    browser.send("Page.navigate", {"url": "about:blank"})


@pytest.fixture
def flower(broker_url: str) -> Iterator[Callable[..., FlowerProcess]]:
    """Start a Flower, with the options of `FlowerProcess`; stopped at the end of the test."""
    with ExitStack() as opened:
        # Of the test's own: its files are removed with it.
        workspace = opened.enter_context(Workspace())

        def start(**options: Any) -> FlowerProcess:
            options.setdefault("broker_url", broker_url)
            return opened.enter_context(FlowerProcess(workspace, **options))

        yield start


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where screenshots go: a directory that the variable SCREENSHOTS names, to look at them, or one of the test's."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
