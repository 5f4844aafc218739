"""An application whose client and engine are instrumented for OpenTelemetry, each in the process that opens it."""

from __future__ import annotations

import os

import httpx
import sqlalchemy
from celery import Celery
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from sqlalchemy import event, text

from tests.support.recorder import record
from workerpools import PooledTask, WorkerPools
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

app = Celery("shop", broker=os.environ["SHOP_BROKER"], backend=os.environ["SHOP_RESULTS"])
pools = WorkerPools(app)


class Recorder(SpanExporter):
    """Writes each span's name, scope and success into the record."""

    def export(self, spans: object) -> SpanExportResult:
        for span in spans:  # type: ignore[attr-defined]
            assert isinstance(span, ReadableSpan)
            scope = span.instrumentation_scope
            record("span", [span.name, "" if scope is None else scope.name, span.status.is_ok])
        return SpanExportResult.SUCCESS


provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(Recorder()))


def trace_statements(engine: sqlalchemy.Engine) -> None:
    # The instrumentor does not declare SQLAlchemy 2.1 yet.
    SQLAlchemyInstrumentor().instrument(engine=engine, tracer_provider=provider, skip_dep_check=True)


def trace_requests(client: httpx.Client) -> None:
    HTTPXClientInstrumentor.instrument_client(client, tracer_provider=provider)


everywhere = os.environ["SHOP_TRACE"] == "everywhere"
if everywhere:
    # It wraps create_engine(), once a process and for all engines to come.
    SQLAlchemyInstrumentor().instrument(tracer_provider=provider, skip_dep_check=True)


class ShopTask(PooledTask):
    """A base whose client and engine are instrumented wherever they are opened."""

    api = pools.add(HttpxClient(base_url=os.environ["SHOP_API"], on_open=trace_requests))
    db = pools.add(SQLAlchemyEngine(os.environ["SHOP_DATABASE"], on_open=None if everywhere else trace_statements))
    plain = pools.add(SQLAlchemyEngine(os.environ["SHOP_DATABASE"]))
    session = TaskSession(db)


if everywhere:
    # Used in the main process before it forks, and listened to there.
    ShopTask.api.get().get("/echo/parent").raise_for_status()
    with ShopTask.db.get().connect() as _connection:
        _connection.execute(text("select 1"))
    event.listen(ShopTask.plain.get(), "before_cursor_execute", lambda *_: None)


@app.task(base=ShopTask, bind=True, name="shop.visit")
def visit(self: ShopTask, number: int) -> int:
    """Use all of them."""
    with self.plain.connect() as connection:
        connection.scalar(text("select 1"))
    self.session.scalar(text("select 2"))
    self.api.get(f"/echo/{number}").raise_for_status()
    return os.getpid()
