"""Clients for each run, without bounds, or shared."""

from __future__ import annotations

import asyncio
import os
import urllib.request
from typing import Any

import aiohttp
import httpx
import redis
import requests
import sqlalchemy
from celery import Task
from celery.signals import worker_init, worker_process_init
from planted.app import app
from planted.hazards import aclient, engine
from redis import Redis as Cache
from sqlalchemy import create_engine as make
from sqlalchemy.ext.asyncio import create_async_engine

URL = "http://api.invalid"


@app.task
def client_per_run() -> None:
    """One of each kind."""
    with httpx.Client() as client:  # planted: WP201
        client.get(URL)
    Cache(host="cache")  # planted: WP201
    helper()


def helper() -> None:
    """Called by a body, and so a part of it."""
    requests.Session().get(URL, timeout=5)  # planted: WP201


@app.task
def one_shot() -> None:
    """Connects for each request."""
    httpx.get(URL)  # planted: WP202


class Report(Task):
    """A class-based task."""

    name = "planted.report"

    def run(self) -> None:
        """Make an engine."""
        made = make("sqlite://")  # planted: WP203
        made.dispose()


app.register_task(Report())

limits = httpx.Limits(max_keepalive_connections=20)  # planted: WP204


def unlimited() -> Any:
    """Make what has no limit."""
    return sqlalchemy.create_engine("sqlite://", max_overflow=-1)  # planted: WP204


@app.task
def endless() -> None:
    """Waits for ever, in five ways."""
    requests.get(URL)  # planted: WP202, WP205
    session = requests.Session()  # planted: WP201
    session.post(URL)  # planted: WP205
    urllib.request.urlopen(URL)  # planted: WP205


timeout = httpx.Timeout(5, pool=None)  # planted: WP205
total = aiohttp.ClientTimeout(total=None)  # planted: WP205


def waiting() -> object:
    """Make a pool that waits for ever."""
    return redis.BlockingConnectionPool(timeout=None)  # planted: WP205


@app.task
def run_a_loop() -> int:
    """Each run has a loop of its own, and the client one."""
    return asyncio.run(ask())  # planted: WP206


async def ask() -> int:
    """Ask."""
    return (await aclient.get(URL)).status_code


class DatabaseTask(Task):
    """The base of many a page."""

    abstract = True
    _db = None

    @property
    def db(self) -> Any:
        """The connection, made on first use."""
        if self._db is None:
            self._db = Database.connect()  # planted: WP207
        return self._db


class Database:
    """Somebody's."""

    @staticmethod
    def connect() -> object:
        """Connect."""
        return object()


@worker_process_init.connect
def renew(**_: Any) -> None:
    """Drop what was inherited, and say goodbye on it."""
    engine.dispose()  # planted: WP209


os.register_at_fork(after_in_child=create_async_engine("postgresql+asyncpg://db").sync_engine.dispose)  # planted: WP209


@worker_init.connect
def connect(**_: Any) -> None:
    """Open in the parent."""
    app.state = httpx.Client()  # planted: WP212
