"""Which children a worker has, asked from any of its threads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from workerpools._celery.sharing import children


@pytest.mark.parametrize(
    ("info", "found"),
    [
        ({"processes": [3, 4]}, [3, 4]),
        # The main thread is just starting one.
        ({"processes": [3, None]}, [3]),
        ({"processes": []}, []),
        ({"processes": "N/A"}, None),
        ({}, None),
        (None, None),
    ],
)
def test_children(info: Any, found: list[int] | None) -> None:
    """Those that have a process id; None where they are not known."""
    assert children(SimpleNamespace(pool=SimpleNamespace(info=info))) == found


def test_no_execution_pool_yet() -> None:
    """Before the worker has started."""
    assert children(SimpleNamespace()) is None
