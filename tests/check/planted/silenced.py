"""What comments leave out."""

from __future__ import annotations

import httpx
from planted.app import app


@app.task
def looked_at() -> None:
    """Known, and meant."""
    httpx.get("http://api.invalid")  # workerpools: ignore[WP202] once a month


@app.task
def not_said_why() -> None:
    """A silence without a reason silences nothing."""
    httpx.get("http://api.invalid")  # workerpools: ignore[WP202] # planted: WP001, WP202


@app.task
def misspelled() -> None:
    """A code that there is not."""
    httpx.get("http://api.invalid", timeout=3)  # workerpools: ignore[WP2002] typo # planted: WP002, WP202
