"""The Django app: it watches Django's connections from the start of the process."""

from __future__ import annotations

from django.apps import AppConfig

__all__ = ["WorkerPoolsConfig"]


class WorkerPoolsConfig(AppConfig):
    """``INSTALLED_APPS = [..., "workerpools.django"]``."""

    name = "workerpools.django"
    label = "workerpools"
    verbose_name = "workerpools"

    def ready(self) -> None:
        """Watch the connections."""
        from workerpools.django import install

        install()
