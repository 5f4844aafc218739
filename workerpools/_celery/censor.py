"""What Celery shows of our settings: nothing secret."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from celery.app import utils as celery_utils

from workerpools._pools.settings import PREFIX
from workerpools._text import redact_url

__all__ = ["hide_secrets"]

_MASK = "*" * 8


def hide_secrets() -> None:
    """Have ``celery report``, ``inspect conf`` and Flower show our settings without the secrets of their URLs.

    Celery hides a setting by words in its name; ``workerpools_http_base_url`` has none of them. Idempotent.
    """
    censor = celery_utils.filter_hidden_settings
    if getattr(censor, "hides", None) == PREFIX:
        return

    @functools.wraps(censor)
    def filter_hidden_settings(conf: Any) -> Any:
        return {key: _censored(key, value) for key, value in censor(conf).items()}

    filter_hidden_settings.hides = PREFIX  # type: ignore[attr-defined]
    celery_utils.filter_hidden_settings = filter_hidden_settings


def _censored(key: object, value: Any) -> Any:
    if isinstance(value, Mapping) and str(key).lower().endswith(PREFIX[:-1]):
        # Flat settings written as a dictionary, which a worker refuses and a report shows.
        return _MASK
    if not isinstance(value, str) or PREFIX not in str(key).lower():
        return value
    if "://" in value:
        return redact_url(value)
    # A URL without a scheme looks like a bare password.
    return _MASK if str(key).lower().endswith("url") else value
