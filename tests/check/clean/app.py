"""The app."""

from __future__ import annotations

from celery import Celery

app = Celery("clean", include=["clean.clients", "clean.transactions"])
app.conf.update(broker_url="memory://", task_time_limit=60, task_soft_time_limit=50)
app.conf.workerpools_check_ignore = {"WP202": "one request a day"}
