"""Tasks that touch what they are given and do nothing with it, so that only the giving is measured."""

from __future__ import annotations

from typing import Any

import celery_svcs
import httpx
from dependency_injector import containers, providers
from dependency_injector.wiring import Provide, inject
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from benchmarks.apps import common
from workerpools import DatabaseTask, HTTPTask, PooledTask, WorkerPools
from workerpools.httpx import HttpxClient

DATABASE_URL = "postgresql+psycopg2://nobody@127.0.0.1:1/nothing"

app = common.make("touch")
app.conf.update(workerpools_database_url=DATABASE_URL, workerpools_http_base_url="http://127.0.0.1:1")

pools = WorkerPools(app)


class ClientTask(PooledTask):
    """With a client."""

    abstract = True
    client = pools.add(HttpxClient(base_url="http://127.0.0.1:1"))


svcs_app = common.make("touch_svcs")
celery_svcs.init(svcs_app)

# Neither connects before its first request.
ENGINE = create_engine(DATABASE_URL)
CLIENT = httpx.Client(base_url="http://127.0.0.1:1")

_registry = celery_svcs.get_registry(svcs_app)
_registry.register_value(Engine, ENGINE)
_registry.register_value(httpx.Client, CLIENT)
_registry.register_factory(Session, lambda: Session(ENGINE))


class Container(containers.DeclarativeContainer):
    """dependency-injector's providers: functions, because it copies whatever else it is given."""

    client = providers.Singleton(lambda: CLIENT)
    session = providers.Factory(lambda: Session(ENGINE))


@app.task(name="plain")
def plain(number: float) -> None:
    """Do nothing."""


@app.task(base=PooledTask, name="pooled")
def pooled(number: float) -> None:
    """Do nothing, in an attempt."""


@app.task(name="global_client")
def global_client(number: float) -> None:
    """Touch a module's client."""
    CLIENT  # noqa: B018


@app.task(base=HTTPTask, bind=True, name="http")
def http(self: HTTPTask, number: float) -> None:
    """Touch the task's client."""
    self.http  # noqa: B018


@app.task(base=ClientTask, bind=True, name="attribute")
def attribute(self: ClientTask, number: float) -> None:
    """Touch the task's client."""
    self.client  # noqa: B018


@app.task(base=ClientTask, name="parameter")
def parameter(number: float, client: httpx.Client = ClientTask.client.inject()) -> None:
    """Be given the client."""


@app.task(name="session_by_hand")
def session_by_hand(number: float) -> None:
    """Open and close a session by hand."""
    with Session(ENGINE):
        pass


@app.task(base=DatabaseTask, bind=True, name="session")
def session(self: DatabaseTask, number: float) -> None:
    """Touch the attempt's session."""
    self.session  # noqa: B018


@svcs_app.task(bind=True, name="svcs_client")
def svcs_client(self: Any, number: float) -> None:
    """Get celery-svcs's client."""
    celery_svcs.svcs_from(self).get(httpx.Client)


@svcs_app.task(bind=True, name="svcs_session")
def svcs_session(self: Any, number: float) -> None:
    """Get celery-svcs's session; it closes none by itself, so commit and close it here."""
    with celery_svcs.svcs_from(self).get(Session) as opened:
        opened.commit()


@app.task(name="injected_client")
@inject
def injected_client(number: float, client: httpx.Client = Provide[Container.client]) -> None:
    """Get dependency-injector's client."""


@app.task(name="injected_session")
@inject
def injected_session(number: float, session: Session = Provide[Container.session]) -> None:
    """Get dependency-injector's session."""
    with session:
        session.commit()


Container().wire(modules=[__name__])
