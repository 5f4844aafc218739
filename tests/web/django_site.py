"""The same endpoints in Django: its own connections for the data, the declared clients for the rest."""

from __future__ import annotations

import os
from typing import Any

import django
from celery import Celery
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.db import connection, transaction
from django.http import HttpRequest, JsonResponse
from django.urls import path
from sqlalchemy import make_url

from tests.support.recorder import record
from workerpools import PooledTask, WorkerPools
from workerpools.httpx import AsyncHttpxClient, HttpxClient

database = make_url(os.environ["SHOP_DATABASE"])
# Under ASGI, Django runs each request in a thread of its own, whose connection nothing else can use.
kept = 0 if os.environ.get("SHOP_ASGI") else None
settings.configure(
    SECRET_KEY="of a test",
    ALLOWED_HOSTS=["127.0.0.1"],
    ROOT_URLCONF=__name__,
    INSTALLED_APPS=["workerpools.django"],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": database.host,
            "PORT": database.port,
            "NAME": database.database,
            "USER": database.username,
            "PASSWORD": database.password,
            "CONN_MAX_AGE": kept,
            "CONN_HEALTH_CHECKS": True,
        }
    },
)
django.setup()

app = Celery("web", broker=os.environ["SHOP_BROKER"], backend=os.environ["SHOP_RESULTS"], set_as_current=False)
pools = WorkerPools(app)


class ShopTask(PooledTask):
    api = pools.add(HttpxClient(base_url=os.environ["SHOP_API"]))
    later = pools.add(AsyncHttpxClient(base_url=os.environ["SHOP_API"]))


def backend() -> int:
    with connection.cursor() as cursor:
        cursor.execute("select pg_backend_pid()")
        return int(cursor.fetchone()[0])


def show(request: HttpRequest, token: str) -> JsonResponse:
    found = ShopTask.api.get().get(f"/echo/{token}", params={"delay": 0.5} if token == "slow" else None).text
    return JsonResponse({"pid": os.getpid(), "backend": backend(), "text": found})


def both(request: HttpRequest, token: str) -> JsonResponse:
    """A plain view that waits for an asynchronous client."""
    return JsonResponse(pools.run(ShopTask.later.get().get(f"/echo/{token}")).text, safe=False)


def add(request: HttpRequest, number: int) -> JsonResponse:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("insert into orders values (%s, 0)", [number])
        transaction.set_rollback(request.GET["commit"] == "false")
    return JsonResponse([True], safe=False)


urlpatterns = [path("show/<token>", show), path("both/<token>", both), path("orders/<int:number>", add)]

if os.environ.get("SHOP_PARENT"):
    # gunicorn --preload: the process that forks has used both.
    record("parent", backend())
    ShopTask.api.get().get("/echo/parent")

application: Any = get_asgi_application() if os.environ.get("SHOP_ASGI") else get_wsgi_application()
