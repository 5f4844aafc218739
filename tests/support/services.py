"""What a test needs from the machine: missing on a laptop it is skipped, missing in CI it has failed."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from demo_tasks.servers import ServerError


def require(condition: object, reason: str) -> None:
    """Skip the running test when `condition` is false, or fail it when the environment variable CI is set.

    Args:
        condition: Whether the service is there.
        reason: What is missing and how to get it.
    """
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"required in CI: {reason}", pytrace=False)
    pytest.skip(reason)


def require_program(find: Callable[[], object]) -> None:
    """Skip or fail the running test, as `require` does, when a server's program is not there.

    Args:
        find: What looks for it, and raises `ServerError` with what to do when it is missing.
    """
    reason = ""
    try:
        find()
    except ServerError as error:
        reason = str(error)
    require(not reason, reason)
