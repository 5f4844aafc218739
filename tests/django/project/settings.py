"""The settings of a small Django project: two aliases of one database, and what a test's environment says."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

if os.environ.get("PROJECT_DRIVER") == "psycopg2":
    # Django takes psycopg 3 wherever it is installed.
    sys.modules["psycopg"] = None  # type: ignore[assignment]

_DATABASE: dict[str, Any] = {
    "ENGINE": "django.db.backends.postgresql",
    **json.loads(os.environ["PROJECT_DATABASE"]),
}

SECRET_KEY = "of a test"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["tests.django.project.shop", "workerpools.django"]
DATABASES = {
    "default": _DATABASE,
    # Without psycopg's pool: each alias is watched in its own way.
    "other": {
        **_DATABASE,
        "CONN_MAX_AGE": None,
        "OPTIONS": {"application_name": "project other"},
        **json.loads(os.environ.get("PROJECT_OTHER", "{}")),
    },
    # For the project's own tests.
    "sqlite": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
    "manual": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:", "AUTOCOMMIT": False},
}
# Two aliases of one database, which its tests must know.
DATABASES["other"]["TEST"] = {"MIRROR": "default"}
