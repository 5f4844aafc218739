"""What is open before the fork."""

from __future__ import annotations

import asyncio
import os
import socket
import threading

import httpx
import psycopg2
import redis
import requests
from planted.app import app
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from workerpools import PooledTask, WorkerPools
from workerpools.httpx import HttpxClient

DATABASE, BROKER, API = os.environ["DATABASE_URL"], os.environ["BROKER_URL"], os.environ["API_URL"]
HOST, _, PORT = API.removeprefix("http://").rpartition(":")

connection = psycopg2.connect(DATABASE.replace("+psycopg2", ""))  # planted: WP101
used = create_engine(DATABASE)  # planted: WP101
with used.connect() as _connected:
    _connected.execute(text("SELECT 1"))
file_engine = create_engine(f"sqlite:///{os.environ['PLANTED']}/file.db")  # planted: WP101
with file_engine.connect() as _connected:
    _connected.execute(text("SELECT 1"))
http = httpx.Client()  # planted: WP101
http.get(API)
clients = {  # planted: WP101
    "carrier": requests.Session(),
}
clients["carrier"].get(API)
cache = redis.Redis.from_url(BROKER)  # planted: WP101
cache.ping()


class Line:
    """Somebody's own protocol."""

    def __init__(self) -> None:
        self.peer = socket.create_connection((HOST, int(PORT)))


line = Line()  # planted: WP101


def kept(opened: socket.socket) -> object:
    """Keep something where only a function finds it."""
    return lambda: opened


hidden = kept(socket.create_connection((HOST, int(PORT))))  # WP102 has no name to tell

engine = create_engine(DATABASE)  # planted: WP103
api = httpx.Client()  # planted: WP104


class Stock:
    """Holds a client for all its instances."""

    session = requests.Session()  # planted: WP104


idle = redis.Redis()  # planted: WP105
session = Session(engine)  # planted: WP106
Scoped = scoped_session(sessionmaker(engine))  # planted: WP106
Scoped()
loop = asyncio.new_event_loop()  # planted: WP107
aclient = httpx.AsyncClient()  # planted: WP107


def forever() -> None:  # planted: WP108
    """Wait."""
    threading.Event().wait()


threading.Thread(target=forever, daemon=True).start()

pools = WorkerPools(app)


class ShopTask(PooledTask):
    """A base with a resource that is opened too early."""

    abstract = True

    rates = pools.add(HttpxClient(base_url=API))  # planted: WP109


ShopTask.rates.get().get("/")
