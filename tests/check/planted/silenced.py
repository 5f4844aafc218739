"""What comments leave out."""

from __future__ import annotations

import httpx
from celery import Celery
from planted.app import app
from sqlalchemy.exc import OperationalError


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


def made() -> Celery:
    """Make another app, as some projects do."""
    return Celery("other", set_as_current=False)


celery_app = made()


@celery_app.task(autoretry_for=(OperationalError,))  # planted: WP208
def of_another_app() -> None:
    """Its app knows it, and the one that is checked does not."""
