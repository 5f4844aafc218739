"""Clients that are declared, and look-alikes of what is wrong."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from typing import Any

import httpx
import redis
import requests
from celery import Task
from celery.signals import worker_init, worker_process_init
from clean.app import app
from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

from workerpools import PooledTask, WorkerPools
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

pools = WorkerPools(app)
URL = os.environ["API_URL"]


class ShopTask(PooledTask):
    """A base with resources."""

    abstract = True

    api = pools.add(HttpxClient(base_url=URL))
    db = pools.add(SQLAlchemyEngine(os.environ["DATABASE_URL"]))
    session = TaskSession(db)
    reports = TaskSession(db, commit=False)


# Makes a session for whoever asks, and none is asked for here.
Session = scoped_session(sessionmaker())
lock = threading.Lock()
limits = httpx.Limits(max_connections=10)
timeout = httpx.Timeout(5, connect=2)


@app.task(base=ShopTask, bind=True)
def price(self: ShopTask, sku: str, requests: list[str]) -> int:
    """Names that mean something else here."""
    requests.get = sku  # type: ignore[attr-defined]
    return self.api.get(f"/{sku}").status_code


@functools.lru_cache
def client() -> httpx.Client:
    """Make the process's client, once."""
    return httpx.Client(limits=limits, timeout=timeout)


_redis = None


def cache() -> redis.Redis:
    """Make the process's client, once."""
    global _redis
    if _redis is None:
        _redis = redis.Redis()
    return _redis


@app.task
def cached() -> None:
    """Make nothing."""
    client().get(URL)
    cache().ping()


@app.task
def bounded(options: dict[str, Any]) -> None:
    """Each request has an end; what is not written here is not known."""
    requests.get(URL, timeout=3)
    requests.get(URL, **options)


@app.task
def run_a_loop() -> float:
    """A loop without a client."""
    return asyncio.run(asyncio.sleep(0, 1.0))


def script() -> None:
    """Called by no task."""
    with httpx.Client() as mine:
        mine.get(URL)
    create_engine("sqlite://").dispose()


class ModelTask(Task):
    """What it keeps is no connection."""

    abstract = True
    _model = None

    @property
    def model(self) -> object:
        """The model, loaded on first use."""
        if self._model is None:
            self._model = object()
        return self._model


# Connected before the fork; no child uses that connection, or closes it.
engine = create_engine(os.environ["DATABASE_URL"])
with engine.connect() as _connected:
    _connected.execute(text("SELECT 1"))


@worker_process_init.connect
def renew(**_: Any) -> None:
    """Drop what was inherited, in silence."""
    drop()


def drop() -> None:
    """Called by a receiver."""
    engine.dispose(close=False)


@worker_init.connect
def announce(**_: Any) -> None:
    """Say hello."""
    print("hello")


print("an app that prints does not disturb the report")
