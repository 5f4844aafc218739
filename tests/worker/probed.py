"""The shop, whose main loop can be stalled, and counts as stalled soon."""

from __future__ import annotations

import time
from typing import Any

from celery.worker.control import control_command

from tests.worker.shop import app
from workerpools._celery import health

__all__ = ["app"]

health.STALLED_AFTER = 1.5


@control_command(name="stall", args=[("seconds", float)])
def stall(state: Any, seconds: float) -> None:
    """Occupy the main loop."""
    time.sleep(seconds)


@app.task(name="shop.nap")
def nap(seconds: float) -> None:
    """Take a while."""
    time.sleep(seconds)
