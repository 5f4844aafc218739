"""What the tests of httpx have in common."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_leaks(no_pool_leaks: None) -> None:
    """No test leaves a connection in use."""
