"""OpenTelemetry's instrumentation of SQLAlchemy and httpx, attached in on_open, in the children of a prefork worker."""

from __future__ import annotations

import pytest

from tests.support.stand import Stand

pytest.importorskip("opentelemetry.instrumentation.sqlalchemy", reason="opentelemetry-instrumentation-sqlalchemy")
pytest.importorskip("opentelemetry.instrumentation.httpx", reason="opentelemetry-instrumentation-httpx")

pytestmark = pytest.mark.worker

SQL = "opentelemetry.instrumentation.sqlalchemy"
HTTP = "opentelemetry.instrumentation.httpx"


@pytest.mark.parametrize(("trace", "statements"), [("on_open", 3), ("everywhere", 6)])
def test_children_make_spans(stand: Stand, trace: str, statements: int) -> None:
    """For each request, and for each statement of the engine that on_open instruments, or of every engine; in the
    child, also where the main process used both before. Of what was attached to the live engine it says that it is
    lost."""
    with stand.worker(app="tests.worker.instrumented:app", concurrency=1, env={"SHOP_TRACE": trace}) as worker:
        (pid,) = {stand.call("visit", number) for number in range(3)}
        assert pid in worker.children()
        spans = [entry.detail for entry in stand.entries("span") if entry.pid == pid]
        assert spans.count(["GET", HTTP, True]) == 3
        assert len([name for name, scope, _ in spans if scope == SQL and name.startswith("select")]) == statements
        warnings = [line for line in worker.log().splitlines() if "on_open=" in line]
        if trace == "everywhere":
            (warning,) = warnings
            assert "'plain'" in warning
            assert "(before_cursor_execute)" in warning
            assert "SQLAlchemyEngine(on_open=…)" in warning
        else:
            assert warnings == []
        assert worker.stop() == 0
