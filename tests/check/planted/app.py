"""The app."""

from __future__ import annotations

from celery import Celery

app = Celery("planted", include=["planted.hazards", "planted.clients", "planted.transactions", "planted.silenced"])
app.conf.update(broker_url="memory://")
