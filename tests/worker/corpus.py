"""Fifty resources, each with a secret in its URL or options, and tasks that fail with them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx
from celery import Celery
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from sqlalchemy import text

from workerpools import DatabaseTask, HTTPTask, PooledTask, WorkerPools, opentelemetry
from workerpools.events import Event
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine

__all__ = ["NAMES", "SECRETS", "app"]

ODD = (
    *("", "@", "/", "?", "#", ":", " ", "%", "&k=", "\u00e4\u20ac", "'", '"', "\\", "[]", "{}", "+", "$X", ";,", "\t"),
    "<b>&amp;",
)


def secret(number: int, odd: str = "") -> str:
    """Return a secret; whatever becomes of its odd characters, its ends can be found."""
    return f"s3cr3t{number:02d}{odd}t4il{number:02d}"


#: What must be found nowhere.
SECRETS = [f"{end}{number:02d}" for number in range(52) for end in ("s3cr3t", "t4il")]

provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))

app = Celery("corpus", broker=os.environ["SHOP_BROKER"], backend=os.environ["SHOP_RESULTS"])
app.conf.broker_connection_retry_on_startup = True
pools = WorkerPools(app)
logger = logging.getLogger("corpus")

API = os.environ["SHOP_API"].removeprefix("http://")
HOST = os.environ["CORPUS_DATABASE"]
#: Nobody listens there.
CLOSED = "127.0.0.1:1"

app.conf.workerpools_http_base_url = f"http://me:{quote(secret(50, '@/'), safe='')}@{API}"
app.conf.workerpools_database_url = f"postgresql+psycopg2://me:{quote(secret(51, '@/'), safe='')}@{HOST}/x"


def traced(client: httpx.Client) -> None:
    """Trace a client's requests."""
    HTTPXClientInstrumentor.instrument_client(client, tracer_provider=provider)


def engine_traced(engine: Any) -> None:
    """Trace an engine's statements."""
    # The instrumentor does not declare SQLAlchemy 2.1 yet.
    SQLAlchemyInstrumentor().instrument(engine=engine, tracer_provider=provider, skip_dep_check=True)


def api(**options: Any) -> HttpxClient:
    return HttpxClient(**{"base_url": f"http://{API}", "on_open": traced, **options})


def database(url: str, **options: Any) -> SQLAlchemyEngine:
    return SQLAlchemyEngine(url, on_open=engine_traced, **options)


adapters: list[Callable[[int], Any]] = [
    *(
        lambda n, odd=odd: api(base_url=f"http://me:{quote(secret(n, odd), safe='')}@{API}/v1/")  # type: ignore[misc]
        for odd in ODD
    ),
    *(
        lambda n, odd=odd: database(  # type: ignore[misc]
            f"postgresql+{('psycopg2', 'psycopg')[n % 2]}://me:{quote(secret(n, odd), safe='')}@{HOST}/x"
        )
        for odd in ODD
    ),
    lambda n: api(base_url=f"http://{secret(n)}@{API}"),
    # Without a span: the instrumentor's has the whole path and query, as httpx's own log line has.
    lambda n: api(base_url=f"http://{CLOSED}/hooks/{secret(n)}/{secret(n, '-')}", on_open=None),
    lambda n: api(base_url=f"http://{CLOSED}/?key={secret(n, '=')}", on_open=None),
    lambda n: api(headers={"Authorization": f"Bearer {secret(n)}", "X-Key": secret(n, ";")}),
    lambda n: api(auth=("me", secret(n, ":"))),
    lambda n: api(credentials=lambda: secret(n), cookies={"session": secret(n)}),
    lambda n: api(proxy=f"http://me:{quote(secret(n, '@'), safe='')}@{CLOSED}"),
    lambda n: database(f"postgresql+psycopg2://me@{HOST}/x", connect_args={"password": secret(n, "' ")}),
    lambda n: database(f"postgresql+psycopg://{HOST}/x?user=me&password={secret(n)}"),
    lambda n: database(f"postgresql+psycopg2://{HOST}/x", credentials=lambda: ("me", secret(n, "\\"))),
]
assert len(adapters) == 50

resources = {f"r{number:02d}": pools.add(make(number), name=f"r{number:02d}") for number, make in enumerate(adapters)}
NAMES = (*resources, "http", "engine")


@pools.subscribe
def told(event: Event) -> None:
    """Log what happens."""
    logger.info("event %r", event)


class CorpusTask(HTTPTask, DatabaseTask, PooledTask):
    """Everything declared here."""

    abstract = True
    replay = False


@app.task(base=CorpusTask, bind=True, name="corpus.use")
def use(self: Any, name: str) -> None:
    """Fail with a resource, and say all that is known of it."""
    resource = resources.get(name)
    logger.warning("using %r, %s", resource, "" if resource is None else resource.adapter.describe())
    value = getattr(self, name) if resource is None else resource.get()
    logger.warning("using %r", value)
    if isinstance(value, httpx.Client):
        value.get("/nothing").raise_for_status()
    else:
        with value.connect() as connection:
            connection.execute(text("SELECT 1 / 0"))


if "CORPUS_WORKER" in os.environ:
    reader = PeriodicExportingMetricReader(ConsoleMetricExporter(), export_interval_millis=math.inf)
    opentelemetry.instrument(pools, MeterProvider(metric_readers=[reader]), export_interval=1.0)
