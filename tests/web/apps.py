"""The same endpoints in FastAPI and in Flask, over the declarations that tasks use."""

from __future__ import annotations

import os
from typing import Annotated, Any

import fastapi
import flask
import httpx
from celery import Celery
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from tests.support.recorder import record
from workerpools import PooledTask, WorkerPools
from workerpools.fastapi import depends, lifespan
from workerpools.flask import request_session
from workerpools.httpx import AsyncHttpxClient, HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

app = Celery("web", broker=os.environ["SHOP_BROKER"], backend=os.environ["SHOP_RESULTS"], set_as_current=False)
pools = WorkerPools(app)


class ShopTask(PooledTask):
    api = pools.add(HttpxClient(base_url=os.environ["SHOP_API"]))
    later = pools.add(AsyncHttpxClient(base_url=os.environ["SHOP_API"]))
    db = pools.add(SQLAlchemyEngine(os.environ["SHOP_DATABASE"]))
    session = TaskSession(db)


INSERT = text("insert into orders values (:number, 0)")
BACKEND = text("select pg_backend_pid()")


def answer(api: httpx.Client, session: Session, token: str) -> dict[str, Any]:
    found = api.get(f"/echo/{token}", params={"delay": 0.5} if token == "slow" else None).text
    return {"pid": os.getpid(), "backend": session.scalar(BACKEND), "text": found}


fast = fastapi.FastAPI(lifespan=lifespan(pools))

Api = Annotated[httpx.Client, depends(ShopTask.api)]
Later = Annotated[httpx.AsyncClient, depends(ShopTask.later)]
Own = Annotated[Session, depends(ShopTask.session)]
Db = Annotated[Engine, depends(ShopTask.db)]


@fast.get("/show/{token}")
def show(token: str, api: Api, session: Own) -> dict[str, Any]:
    return answer(api, session, token)


@fast.get("/later/{token}")
async def show_later(token: str, later: Later) -> dict[str, Any]:
    return {"pid": os.getpid(), "text": (await later.get(f"/echo/{token}")).text}


@fast.get("/both/{token}")
def from_a_thread(token: str, later: Later) -> str:
    return pools.run(later.get(f"/echo/{token}")).text


@fast.post("/orders/{number}")
def add(number: int, session: Own, db: Db, commit: bool = True) -> bool:
    session.execute(INSERT, {"number": number})
    if commit:
        session.commit()
    return session.get_bind() is db


web = flask.Flask("web")
session = request_session(web, ShopTask.session)


@web.get("/show/<token>")
def flask_show(token: str) -> dict[str, Any]:
    return answer(ShopTask.api.get(), session(), token)


@web.post("/orders/<int:number>")
def flask_add(number: int) -> list[bool]:
    session.execute(INSERT, {"number": number})
    if flask.request.args.get("commit") != "false":
        session.commit()
    return [session.get_bind() is ShopTask.db.get()]


@app.task(base=ShopTask, name="shop.add_order", bind=True)
def add_order(self: ShopTask, number: int) -> bool:
    """What a service does for views and tasks, in an application context of its own."""
    with web.app_context():
        session.execute(INSERT, {"number": number})
    return session() is self.session


if os.environ.get("SHOP_PARENT"):
    # gunicorn --preload: the process that forks has used both.
    with ShopTask.db.get().connect() as connection:
        held = connection.scalar(BACKEND)
    ShopTask.api.get().get("/echo/parent")
    record("parent", held)
