"""The project's models."""

from __future__ import annotations

from django.db import models


class Order(models.Model):
    """An order, written by a run of a task."""

    number = models.IntegerField()
    note = models.TextField(default="")
