"""What an exception proves, as tables: SQLSTATEs and driver numbers, HTTP exceptions and statuses, foreign clients."""

from __future__ import annotations

import sqlite3
import ssl
from datetime import datetime, timezone
from typing import Any

import httpx
import pytest
import sqlalchemy
from sqlalchemy.exc import DBAPIError, OperationalError

from workerpools import FailureKind, classify
from workerpools.failures import Phase, Sent
from workerpools.httpx._errors import Progress, classify_transport, retry_after
from workerpools.sqlalchemy._errors import classify_connect, classify_statement, error_code


class DriverError(Exception):
    """Stands for a driver's exception."""

    def __init__(self, *args: object, sqlstate: str | None = None, pgcode: str | None = None) -> None:
        super().__init__(*args)
        self.sqlstate = sqlstate
        self.pgcode = pgcode


def kind_of(failure: Any) -> str | None:
    return None if failure is None else failure.kind.value


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("connection refused", "unavailable"),
        ("could not translate host name", "unavailable"),
        ("timeout expired", "unavailable"),
        ("FATAL:  the database system is starting up", "unavailable"),
        ("FATAL:  sorry, too many clients already", "unavailable"),
        ('FATAL:  too many connections for database "shop"', "unavailable"),
        ("FATAL: query_wait_timeout", "unavailable"),
        ('FATAL:  password authentication failed for user "app"', "permanent"),
        ("FATAL: SASL authentication failed", "permanent"),
        ("fe_sendauth: no password supplied", "permanent"),
        ('FATAL:  role "app" does not exist', "permanent"),
        ('FATAL:  database "shop" does not exist', "permanent"),
        ("FATAL: no such database: shop", "permanent"),
        ('no pg_hba.conf entry for host "10.0.0.1"', "permanent"),
        ("SSL error: certificate verify failed", "permanent"),
        ((1045, "Access denied for user 'app'@'db'"), "permanent"),
        ((1049, "Unknown database 'shop'"), "permanent"),
        ((1040, "Too many connections"), "unavailable"),
        ((2003, "Can't connect to MySQL server"), "unavailable"),
    ],
)
def test_connecting(error: Any, kind: str) -> None:
    """Neither PostgreSQL driver carries a SQLSTATE then: the server's words are all there is."""
    failure = classify_connect(DriverError(*(error if isinstance(error, tuple) else (error,))), resource="db")
    assert kind_of(failure) == kind
    assert (failure.sent, failure.phase, failure.resource) == (Sent.NOTHING, Phase.CONNECT, "db")
    assert failure.timed_out is (error == "timeout expired" or "query_wait_timeout" in str(error))


LOST = {"disconnected": True}
COMMIT = {"phase": Phase.COMMIT}


@pytest.mark.parametrize(
    ("code", "circumstances", "kind"),
    [
        ("", LOST, "stale"),
        ("57P01", LOST, "stale"),
        ("57P05", LOST, "stale"),
        ("40001", LOST, "stale"),
        ("", {**LOST, "phase": Phase.ROLLBACK}, "stale"),
        ("", {**LOST, "autocommit": True}, "indeterminate"),
        ("", {**LOST, **COMMIT}, "indeterminate"),
        ("57P01", {**LOST, **COMMIT}, "indeterminate"),
        ("", {**LOST, **COMMIT, "outcome": "aborted"}, "stale"),
        ("", {**LOST, **COMMIT, "commit_sent": False}, "stale"),
        ("25P03", LOST, None),
        ("08P01", {**LOST, "text": "query_wait_timeout"}, "unavailable"),
        ("08P01", {**LOST, "text": "server login has been failing"}, "unavailable"),
        ("", {**LOST, "text": "terminating connection due to idle-in-transaction timeout"}, None),
        ("40001", {}, "aborted"),
        ("40001", COMMIT, "aborted"),
        ("40P01", {}, "aborted"),
        ("55P03", {}, "aborted"),
        ("25006", {}, "stale"),
        ("57P03", {}, "unavailable"),
        ("53300", {}, "unavailable"),
        ("57014", {}, None),
        ("23505", {}, None),
        ("23505", COMMIT, None),
        ("42P01", {}, None),
        ("53100", {}, None),
        ((1213, "Deadlock found"), {}, "aborted"),
        ((1205, "Lock wait timeout exceeded"), {}, "aborted"),
        ((1836, "Running in read-only mode"), {}, "stale"),
        ((1290, "The MariaDB server is running with the --read-only option so it cannot"), {}, "stale"),
        ((1290, "The MySQL server is running with the --super-read-only option so it cannot"), {}, "stale"),
        ((1290, "The MySQL server is running with the --secure-file-priv option so it cannot"), {}, None),
        ((1969, "Query execution was interrupted (max_statement_time exceeded)"), {}, None),
        ((3024, "Query execution was interrupted, maximum statement execution time exceeded"), {}, None),
        ((2013, "Lost connection to MySQL server during query"), LOST, "stale"),
        ((2013, "Lost connection to MySQL server during query"), {**LOST, **COMMIT}, "indeterminate"),
        ((2013, "Lost connection to MySQL server during query (timed out)"), LOST, "indeterminate"),
        ((2013, "Lost connection to MySQL server during query (The read operation timed out)"), LOST, "indeterminate"),
        ((2006, "MySQL server has gone away (TimeoutError('timed out'))"), LOST, "indeterminate"),
        ((2013, "Lost connection to MySQL server during query ([Errno 110] Connection timed out)"), LOST, "stale"),
        ((1062, "Duplicate entry"), {}, None),
        (("database is locked",), {}, "aborted"),
        (("no such table: orders",), {}, None),
    ],
)
@pytest.mark.parametrize("attribute", ["sqlstate", "pgcode"])
def test_statements(code: Any, circumstances: dict[str, Any], kind: str | None, attribute: str) -> None:
    """By the code, the phase, and whether the connection was lost."""
    text = circumstances.get("text", "server closed the connection unexpectedly")
    options: dict[str, Any] = {"phase": Phase.STATEMENT, "disconnected": False, **circumstances}
    options.pop("text", None)
    error = DriverError(*code) if isinstance(code, tuple) else DriverError(text, **{attribute: code or None})
    failure = classify_statement(error, resource="db", **options)
    assert kind_of(failure) == kind
    if failure is not None:
        assert failure.phase is options["phase"]
        assert failure.known


def test_error_code_of_mysql() -> None:
    """The number, which PyMySQL 1.2 accompanies with a SQLSTATE that is the same for most errors."""
    error = DriverError(1205, "Lock wait timeout exceeded; try restarting transaction", sqlstate="HY000")
    assert error_code(error) == "1205"


def test_error_code_of_sqlite() -> None:
    """By name where Python tells it, by its words on Python 3.10."""
    error = sqlite3.OperationalError("database is locked")
    assert error_code(error) == "SQLITE_BUSY"
    assert error_code(None) == ""
    assert error_code(ValueError(True)) == ""


REUSED, FRESH = {"fresh": False}, {"fresh": True}
HEAD = {"head_started": True}
SENT = {"head_started": True, "body_sent": True}


@pytest.mark.parametrize(
    ("error", "progress", "get", "post"),
    [
        (httpx.PoolTimeout("x"), {}, "pool_exhausted", "pool_exhausted"),
        (httpx.ConnectError("x"), FRESH, "unavailable", "unavailable"),
        (httpx.ConnectTimeout("x"), FRESH, "unavailable", "unavailable"),
        (httpx.ProxyError("x"), FRESH, "unavailable", "unavailable"),
        (httpx.ReadError("x"), {}, "unavailable", "unavailable"),
        (httpx.WriteError("x"), {**REUSED, **HEAD, "head_failed": True}, "stale", "stale"),
        (httpx.RemoteProtocolError("x"), {**REUSED, **HEAD, "head_failed": True}, "stale", "stale"),
        (httpx.WriteError("x"), {**FRESH, **HEAD, "head_failed": True}, "unavailable", "unavailable"),
        (httpx.RemoteProtocolError("x"), {**REUSED, **SENT, "refused": True}, "stale", "stale"),
        (httpx.RemoteProtocolError("x"), {**FRESH, **SENT, "refused": True}, "unavailable", "unavailable"),
        (httpx.RemoteProtocolError("x"), {**REUSED, **HEAD}, "stale", "indeterminate"),
        (httpx.RemoteProtocolError("x"), {**REUSED, **SENT}, "stale", "indeterminate"),
        (httpx.ReadError("x"), {**REUSED, **SENT}, "stale", "indeterminate"),
        (httpx.RemoteProtocolError("x"), {**FRESH, **SENT}, "indeterminate", "indeterminate"),
        (httpx.ReadError("x"), {**FRESH, **SENT}, "indeterminate", "indeterminate"),
        (httpx.ReadTimeout("x"), {**REUSED, **SENT}, "indeterminate", "indeterminate"),
        (httpx.WriteTimeout("x"), {**REUSED, **HEAD}, "indeterminate", "indeterminate"),
        (httpx.ReadError("x"), {**REUSED, **SENT, "answered": True}, "indeterminate", "indeterminate"),
        (httpx.LocalProtocolError("x"), {**REUSED, **HEAD, "head_failed": True}, None, None),
        (httpx.UnsupportedProtocol("x"), {}, None, None),
        (httpx.TooManyRedirects("x"), {}, None, None),
        (httpx.ReadError("x"), {"watched": False}, "indeterminate", "indeterminate"),
    ],
)
def test_requests(error: httpx.HTTPError, progress: dict[str, bool], get: str | None, post: str | None) -> None:
    """By what was seen on the wire, for a request that may be sent again and one that may not."""
    for idempotent, kind in ((True, get), (False, post)):
        failure = classify_transport(error, Progress(**progress), idempotent=idempotent, resource="api")
        assert kind_of(failure) == kind
        if failure is not None:
            assert failure.timed_out is isinstance(error, httpx.TimeoutException)


def test_a_certificate_that_is_not_accepted_is_permanent() -> None:
    """Another try would fail in the same way."""
    error = httpx.ConnectError("x")
    error.__cause__ = ssl.SSLCertVerificationError()
    assert kind_of(classify_transport(error, Progress(), idempotent=True)) == "permanent"
    assert kind_of(classify(error)) == "permanent"


def status_error(status: int, method: str = "GET", **headers: str) -> httpx.HTTPStatusError:
    request = httpx.Request(method, "http://shop.test/")
    return httpx.HTTPStatusError(
        "x", request=request, response=httpx.Response(status, headers=headers, request=request)
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (status_error(503), "unavailable"),
        (status_error(503, "POST"), "unavailable"),
        (status_error(429, "POST"), "unavailable"),
        (status_error(502), "unavailable"),
        (status_error(504, "PUT"), "unavailable"),
        (status_error(502, "POST"), "indeterminate"),
        (status_error(504, "POST"), "indeterminate"),
        (status_error(500), None),
        (status_error(404), None),
        (httpx.ConnectError("x"), "unavailable"),
        (httpx.ReadError("x"), "indeterminate"),
        (httpx.InvalidURL("x"), None),
        (sqlalchemy.exc.TimeoutError("x"), "pool_exhausted"),
        (OperationalError("select 1", {}, DriverError("x"), connection_invalidated=True), "indeterminate"),
        (OperationalError("select 1", {}, DriverError("x", sqlstate="40001")), "aborted"),
        (OperationalError("select 1", {}, DriverError("x", sqlstate="57014")), None),
        (DBAPIError(None, None, DriverError("connection refused")), "unavailable"),
        (DBAPIError(None, None, DriverError('role "a" does not exist')), "permanent"),
        (sqlalchemy.exc.ArgumentError("x"), None),
        (ValueError("x"), None),
    ],
)
def test_the_public_function(error: Exception, kind: str | None) -> None:
    """Also for exceptions of clients that are none of ours, of which less is known."""
    assert kind_of(classify(error)) == kind


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        ("Mon, 23 Nov 2026 12:00:30 GMT", 30.0),
        ("Mon, 23 Nov 2026 11:00:00 GMT", 0.0),
        (" 7 ", 7.0),
        ("007", 7.0),
        ("0", 0.0),
        ("9" * 5000, 31_536_000.0),
        ("0" * 5000 + "7", 7.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 31_536_000.0),
        ("Fri, 31 Dec 9999 23:59:59 -2359", 31_536_000.0),
        ("Mon, 99 Nov 2026 12:00:30 GMT", None),
        ("Mon, 23 Nov 99999999999999999999 12:00:30 GMT", None),
        ("²", None),
        ("١٢", None),
        ("1e9", None),
        ("inf", None),
        ("7.5", None),
        ("1_0", None),
        ("7, 8", None),
        ("soon", None),
        ("-5", None),
        ("+5", None),
        (" ", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    """A number of seconds or a date (RFC 9110 §10.2.3)."""
    assert retry_after(value, datetime(2026, 11, 23, 12, 0, 0, tzinfo=timezone.utc)) == seconds


def test_a_status_keeps_what_the_server_asked_for() -> None:
    """Code and Retry-After are in the failure."""
    failure = classify(status_error(503, **{"Retry-After": "7"}))
    assert failure is not None
    assert (failure.kind, failure.code, failure.retry_after) == (FailureKind.UNAVAILABLE, "503", 7.0)
