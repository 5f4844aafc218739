"""What pages tell of the package's own numbers is what the code says; no page has a private name."""

from __future__ import annotations

import inspect
import logging
import re
import threading
from pathlib import Path

import pytest

from tests.docs.markdown import pages
from tests.support.paths import ROOT
from workerpools import OpenTimeoutError, WorkerPools
from workerpools._celery.settings import all_settings
from workerpools._celery.worker import ALERT_INTERVAL, METRICS_HOST
from workerpools._pools import holder
from workerpools._pools.shared import CLOSE_TIMEOUT
from workerpools._run.budget import Budget
from workerpools._run.events import _DEFAULT, _LINES, EventKind
from workerpools._stats.rules import Thresholds
from workerpools.httpx import DEFAULT_TIMEOUT
from workerpools.sqlalchemy import SQLAlchemyEngine

#: A module or an attribute of the package with an underscore, and a name imported from one.
_PRIVATE = re.compile(r"\bworkerpools(\.\w+)*\._|\bfrom workerpools[.\w]* import (\w+, )*_")


def page(name: str) -> str:
    """A page's text, with its lines joined."""
    return " ".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").split())


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from workerpools._run.budget import Budget", True),
        ("from workerpools.httpx import Client, _OPTIONS", True),
        ("from workerpools.httpx import HttpxClient", False),
        ("app.conf.workerpools_close_timeout", False),
    ],
)
def test_what_a_private_name_is(line: str, found: bool) -> None:
    """What the next test looks for."""
    assert bool(_PRIVATE.search(line)) is found


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_page_needs_a_private_name(path: Path) -> None:
    """Whoever pastes from it depends on nothing that may change."""
    assert _PRIVATE.findall(path.read_text(encoding="utf-8")) == []


def test_the_table_of_events() -> None:
    """Each event stands in the part of its logger, with its level."""
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in (ROOT / "docs" / "logging.md").read_text(encoding="utf-8").splitlines()
        if row.startswith("| ")
    ]
    logger, told = "", {}
    for cells in rows[1:]:
        logger = cells[0].strip("`") or logger
        for name in re.findall(r"`(\w+)`", cells[1]):
            told[name] = (logging.getLevelName(cells[2]), logger)
    for kind in EventKind:
        assert told.get(kind.value) == tuple(_LINES.get(kind, _DEFAULT)), kind


def test_the_defaults_of_the_settings() -> None:
    """The number in parentheses."""
    told = {setting.name: setting.meaning for setting in all_settings()}
    declared = inspect.signature(SQLAlchemyEngine).parameters
    defaults = {
        "alert_interval": ALERT_INTERVAL,
        "close_timeout": CLOSE_TIMEOUT,
        "http_timeout": DEFAULT_TIMEOUT.read,
        "http_connect_timeout": DEFAULT_TIMEOUT.connect,
        "http_acquire_timeout": DEFAULT_TIMEOUT.pool,
        "database_connect_timeout": declared["connect_timeout"].default,
        "database_acquire_timeout": declared["acquire_timeout"].default,
        **{f"alert_{name}": value for name, value in vars(Thresholds()).items() if name != "leak_after"},
    }
    assert {name: told[name] for name, value in defaults.items() if f"({value:g})" not in told[name]} == {}
    assert f"({METRICS_HOST})" in told["metrics_host"]


def test_the_budget() -> None:
    """How many tokens there are, and what takes and gives them."""
    text = page("failures")
    assert (
        "Each process has 500 tokens. A replay takes 5, one after a timeout 10; a success gives back 5 for each of "
        "its replays, or 1."
    ) in text
    budget = Budget()
    assert budget.tokens == 500
    assert budget.take(timed_out=False)
    assert budget.tokens == 495
    assert budget.take(timed_out=True)
    assert budget.tokens == 485
    budget.succeeded(2)
    assert budget.tokens == 495
    budget.succeeded(0)
    assert budget.tokens == 496
    assert not Budget(0).take(timed_out=False)


def test_the_message_of_a_slow_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page has it, for the time that a thread waits."""
    assert holder.OPEN_TIMEOUT == 60.0
    monkeypatch.setattr(holder, "OPEN_TIMEOUT", 0.2)
    begun, release = threading.Event(), threading.Event()

    def slowly() -> bool:
        begun.set()
        return release.wait(10)

    slow = WorkerPools().add(slowly, name="slow")
    thread = threading.Thread(target=slow.get)
    thread.start()
    try:
        assert begun.wait(10)
        with pytest.raises(OpenTimeoutError) as caught:
            slow.get()
    finally:
        release.set()
        thread.join()
    message = re.sub(r"pid=\d+", "pid=…", str(caught.value)).replace("for 0 s", "for 60 s")
    assert f"`{message}`" in page("errors")
