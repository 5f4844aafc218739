"""Where the demo's runs keep their files, and that they keep none."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.leftovers import nothing_left_behind


@contextmanager
def empty_place() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="demo-"))
    # As /tmp is: PostgreSQL runs as another user when the tests run as root.
    root.chmod(0o1777)
    try:
        with nothing_left_behind(root):
            yield root
        assert list(root.iterdir()) == []
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def place() -> Iterator[Path]:
    """The temporary directory of the test's runs; they leave neither a process nor a file behind."""
    with empty_place() as root:
        yield root
