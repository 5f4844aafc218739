"""An application without a declaration: everything comes from settings, in each of the ways to name a task base."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, shared_task
from sqlalchemy import text

from workerpools import DatabaseTask, HTTPTask


class Both(HTTPTask, DatabaseTask):
    """A base with a client, an engine and a session."""


@shared_task(base=Both, bind=True, name="shop.shared")
def shared(self: Both, token: str) -> dict[str, Any]:
    """Declared for no application in particular, and before there is one."""
    return look(self, token)


style = os.environ["SHOP_STYLE"]
broker = os.environ["SHOP_BROKER"]
options: dict[str, Any] = {"task_cls": Both} if style == "task_cls" else {}
app = Celery("styles", broker=broker, backend=broker, **options)
if style == "app.Task":
    app.Task = Both
if os.environ.get("SHOP_NAMESPACED"):
    app.config_from_object(
        {
            "CELERY_WORKERPOOLS_DATABASE_URL": os.environ["SHOP_DATABASE"],
            "CELERY_WORKERPOOLS_HTTP_BASE_URL": os.environ["SHOP_API"],
            "CELERY_BROKER_URL": broker,
            "CELERY_RESULT_BACKEND": broker,
        },
        namespace="CELERY",
    )


def look(task: Any, token: str) -> dict[str, Any]:
    return {
        "right": task.http.get(f"/echo/{token}").text == token,
        "name": task.session.scalar(text("select current_setting('application_name')")).replace(
            f" pid={os.getpid()}", ""
        ),
        "size": task.engine.pool.size(),
        "base": isinstance(task, Both),
    }


@app.task(bind=True, name="shop.own", **({"base": Both} if style == "base" else {}))
def own(self: Both, token: str) -> dict[str, Any]:
    """Has its base by what the style says."""
    return look(self, token)
