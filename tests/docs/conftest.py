"""What the pages' blocks find in their environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.shop_api import shop_api
from tests.support.databases import Database
from tests.support.paths import environment

# Read by every interpreter that has the page's directory on its path: the page's own, and its workers'.
_LOOPBACK_ONLY = """\
import sys


def refuse(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"the documentation's code contacts {address[0]}")


sys.addaudithook(refuse)
"""


@pytest.fixture
def api_url() -> Iterator[str]:
    """The shop's HTTP API."""
    with shop_api() as url:
        yield url


@pytest.fixture
def page_environment(tmp_path: Path, database: Database, broker_url: str, api_url: str) -> dict[str, str]:
    """The environment of a page's process: servers of this machine alone, and the page's own directory for its files.

    No proxy is inherited, and no setting of ours.
    """
    (tmp_path / "sitecustomize.py").write_text(_LOOPBACK_ONLY)
    made = environment(
        {
            "DATABASE_URL": database.url(),
            "BROKER_URL": broker_url,
            "API_URL": api_url,
            "PYTHONWARNINGS": "error::DeprecationWarning:__page__",
        }
    )
    made["PYTHONPATH"] = os.pathsep.join((str(tmp_path), made["PYTHONPATH"]))
    return {
        name: value
        for name, value in made.items()
        if not name.lower().endswith("_proxy") and not name.startswith(("WORKERPOOLS_", "CELERY_"))
    }
