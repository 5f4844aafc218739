"""The Celery app, as Celery's documentation for Django has it."""

from __future__ import annotations

import os

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.django.project.settings")

app = Celery("project", broker=os.environ["PROJECT_BROKER"], backend=os.environ["PROJECT_BROKER"])
app.autodiscover_tasks()
