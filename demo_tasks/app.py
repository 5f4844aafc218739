"""The shop's Celery app: ``celery -A demo_tasks.app worker`` and ``celery -A demo_tasks.app flower``."""

from __future__ import annotations

import logging
from typing import Any

from celery import Celery

from demo_tasks.settings import from_environment

__all__ = ["app"]

_settings = from_environment()

# A line for each request and each statement would drown the library's own.
for _name in ("httpx", "sqlalchemy"):
    logging.getLogger(_name).setLevel(logging.WARNING)

# On a Redis server that has other users, everything of the shop's has a prefix.
_transport_options: dict[str, Any] = {"global_keyprefix": _settings.key_prefix} if _settings.key_prefix else {}

app = Celery("shop", include=["demo_tasks.tasks"])
app.conf.update(
    broker_url=_settings.redis_url,
    result_backend=_settings.redis_url,
    broker_transport_options=_transport_options,
    result_backend_transport_options=_transport_options,
    broker_connection_retry_on_startup=True,
    # Results are read within the minute; nobody needs them tomorrow.
    result_expires=3600,
)
