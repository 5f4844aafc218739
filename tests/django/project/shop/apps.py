"""The project's own app."""

from __future__ import annotations

import os

from django.apps import AppConfig


class ShopConfig(AppConfig):
    name = "tests.django.project.shop"
    label = "shop"

    def ready(self) -> None:
        """Use the database before the worker forks, as many projects do by accident."""
        if os.environ.get("PROJECT_PRELOADED"):
            from tests.django.project.shop.models import Order

            Order.objects.count()
