"""The table of failures: what breaks, when, what the library does about it, and what the server saw.

The tests are made from it, and the documentation prints it: ``python -m tests.chaos.table`` prints it as Markdown,
``python -m tests.chaos.table --write`` writes it into ``docs/failures.md``.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.paths import ROOT
from workerpools.failures import FailureKind

PAGE = ROOT / "docs" / "failures.md"
MARK = "<!-- table -->"

STALE = FailureKind.STALE
INDETERMINATE = FailureKind.INDETERMINATE
UNAVAILABLE = FailureKind.UNAVAILABLE

REPLAYED = "replayed by the body"
SENT_AGAIN = "request sent again"
RESOLVED = "commit resolved"
RETRIED = "retried through the broker"
RAISED = "raised"
TIMED_OUT = "ended as the task's time limit"
UNNOTICED = "nothing noticed"

#: A failure's kind (None: resolved, it is none) and what was done about it.
Step = tuple[FailureKind | None, str]

REPLAY: tuple[Step, ...] = ((STALE, REPLAYED),)
RESEND: tuple[Step, ...] = ((STALE, SENT_AGAIN),)
RESOLVE: tuple[Step, ...] = ((None, RESOLVED),)
RETRY: tuple[Step, ...] = ((UNAVAILABLE, RETRIED),)
LOST: tuple[Step, ...] = ((INDETERMINATE, RAISED),)
REFUSED: tuple[Step, ...] = ((STALE, RAISED),)
LIMIT: tuple[Step, ...] = ((None, TIMED_OUT),)

DATABASE = ("psycopg2", "psycopg")
HTTP = ("HTTP", "HTTP over TLS")
PLAIN, TLS = HTTP
REDIS = ("redis-py", "valkey-py")
COMMANDS = ("GET", "INCR")
BOTH_ENDS = ("FIN", "RST")
#: A limit that nothing reaches, so that its timeout is in the first flight; and one that ends what is silent.
_LIMITED, _SHORT = "soft_time_limit=60", "soft_time_limit=1"
REQUESTS = ("GET", "POST", "POST with a key")
MAY_BE_SENT_AGAIN = ("GET", "POST with a key")

IDLE = "idle in the pool"
CONNECTING = "connecting"
LOGGED_IN = "connecting, after the log-in"
FLIGHT = "first flight, before the server got it"
ANSWERED = "first flight, after the server got it"
FIRST_BYTE = "first byte"
MID_QUERY = "mid-query"
BETWEEN = "between statements"
BEFORE_COMMIT = "COMMIT, before the server got it"
AFTER_COMMIT = "COMMIT, after the server got it"
GOT_IT = "request, after the server got it"
HEADERS = "response headers"
MID_ANSWER = "mid-answer"
MID_BODY = "mid-body of the response"


@dataclass(frozen=True)
class Cell:
    """One line of the table: what holds for every break, driver and request that it names.

    Attributes:
        breaks: What broke.
        moment: When.
        steps: What the library did, in order; nothing where it noticed nothing.
        rows: How many rows the database has in the end, when every retry has run.
        requests: How many requests the HTTP server saw, the first ones of ``before`` included.
        increments: How many INCRs the Redis server has done.
        drivers: Over what: the database's drivers, or HTTP plain and over TLS.
        pgbouncer: Whether there was a PgBouncer, in transaction mode, before the database.
        methods: The requests that it was tried with; empty for a database alone.
        before: What the body had done before, in the same attempt.
        declared: What the task or the engine declared.
        remark: What else is to be said.
        defect: Why the library does not do it yet.
    """

    breaks: tuple[str, ...]
    moment: str
    steps: tuple[Step, ...]
    rows: int | None = None
    requests: int | None = None
    increments: int | None = None
    drivers: tuple[str, ...] = DATABASE
    pgbouncer: bool = False
    methods: tuple[str, ...] = ("",)
    before: str = ""
    declared: str = ""
    remark: str = ""
    defect: str = ""


def _database(breaks: str | tuple[str, ...], moment: str, steps: tuple[Step, ...], rows: int = 1, **more: Any) -> Cell:
    return Cell((breaks,) if isinstance(breaks, str) else breaks, moment, steps, rows=rows, **more)


def _pgbouncer(breaks: str | tuple[str, ...], moment: str, steps: tuple[Step, ...], rows: int = 1, **more: Any) -> Cell:
    return _database(breaks, moment, steps, rows, pgbouncer=True, **more)


def _http(
    breaks: str | tuple[str, ...],
    moment: str,
    methods: str | tuple[str, ...],
    steps: tuple[Step, ...],
    requests: int,
    **more: Any,
) -> Cell:
    return Cell(
        (breaks,) if isinstance(breaks, str) else breaks,
        moment,
        steps,
        requests=requests,
        methods=(methods,) if isinstance(methods, str) else methods,
        **{"drivers": HTTP, **more},
    )


def _redis(
    breaks: str | tuple[str, ...],
    moment: str,
    methods: str | tuple[str, ...],
    steps: tuple[Step, ...],
    increments: int = 0,
    **more: Any,
) -> Cell:
    return Cell(
        (breaks,) if isinstance(breaks, str) else breaks,
        moment,
        steps,
        increments=increments,
        methods=(methods,) if isinstance(methods, str) else methods,
        drivers=REDIS,
        **more,
    )


OVER_DATABASE = (
    _database((*BOTH_ENDS, "terminate", "restart immediate"), IDLE, REPLAY),
    _database("blackhole", IDLE, REPLAY, remark="noticed after `tcp_user_timeout`"),
    _database("restart slow", IDLE, REPLAY + RETRY, remark="the replay finds the server down"),
    _database("read-only", IDLE, REPLAY, remark="a failover: the replay reaches the new primary"),
    _database("read-only for long", IDLE, REPLAY + REPLAY + ((STALE, RETRIED),), remark="no replay is left"),
    _database("connection limit", IDLE, (), remark="the connection that is open goes on"),
    _database((*BOTH_ENDS, "restart slow", "connection limit"), CONNECTING, RETRY),
    _database(BOTH_ENDS, LOGGED_IN, RETRY),
    _database("blackhole", CONNECTING, RETRY, remark="after `connect_timeout`"),
    _database("read-only for long", CONNECTING, REPLAY + REPLAY + ((STALE, RETRIED),)),
    _database("wrong password", CONNECTING, ((FailureKind.PERMANENT, RAISED),), 0),
    _database("pool full", CONNECTING, ((FailureKind.POOL_EXHAUSTED, RETRIED),), remark="after `acquire_timeout`"),
    _database((*BOTH_ENDS, "blackhole", "terminate", "restart immediate"), FLIGHT, REPLAY, declared=_LIMITED),
    _database("restart slow", FLIGHT, REPLAY + RETRY, declared=_LIMITED),
    _database((*BOTH_ENDS, "blackhole", "terminate", "restart immediate"), ANSWERED, REPLAY, declared=_LIMITED),
    _database((*BOTH_ENDS, "blackhole", "terminate", "restart immediate"), FIRST_BYTE, REPLAY),
    _database("restart slow", FIRST_BYTE, REPLAY + RETRY),
    _database(BOTH_ENDS, FIRST_BYTE, LOST, 0, declared="autocommit", remark="from here it looks like the next line"),
    _database(BOTH_ENDS, MID_QUERY, LOST, 1, declared="autocommit"),
    _database("terminate", MID_QUERY, LOST, 0, declared="autocommit"),
    _database((*BOTH_ENDS, "blackhole", "terminate"), MID_QUERY, REPLAY),
    _database("restart slow", MID_QUERY, REPLAY + RETRY, remark="a quick one, too: the replay is quicker"),
    _database("serialization failure", BETWEEN, ((FailureKind.ABORTED, REPLAYED),)),
    _database((*BOTH_ENDS, "blackhole", "terminate", "restart immediate"), BETWEEN, REPLAY),
    _database("restart slow", BETWEEN, REPLAY + RETRY),
    _database(("read-only", "connection limit"), BETWEEN, (), remark="the open transaction goes on"),
    _database("terminate", BETWEEN, REFUSED, 0, declared="replay=False"),
    _database("terminate", BETWEEN, REFUSED, 1, before="COMMIT"),
    _database("terminate", BETWEEN, REFUSED, 0, before="self.effect(…)"),
    _database("terminate", BETWEEN, REFUSED, 0, requests=1, before="POST"),
    _database("restart slow", CONNECTING, ((UNAVAILABLE, RAISED),), 0, requests=1, before="POST"),
    _database("terminate", BETWEEN, REPLAY, requests=2, before="GET"),
    _database("terminate", BETWEEN, REPLAY, requests=2, before="POST with a key"),
    _database("terminate", BETWEEN, REPLAY, requests=2, before="POST", declared="idempotent=True"),
    _database((*BOTH_ENDS, "terminate", "restart immediate"), BEFORE_COMMIT, REPLAY, remark="PostgreSQL says: aborted"),
    _database("blackhole", BEFORE_COMMIT, REPLAY, remark="the transaction was in progress; its session was ended"),
    _database(("restart fast", "restart slow"), BEFORE_COMMIT, REPLAY, remark="asked until the server was back"),
    _database("connection limit", BEFORE_COMMIT, (), remark="the open transaction goes on"),
    _database(BOTH_ENDS, BEFORE_COMMIT, LOST, 0, declared="resolve_commit=False"),
    _database(BOTH_ENDS, BEFORE_COMMIT, ((INDETERMINATE, REPLAYED),), declared="resolve_commit=False, idempotent=True"),
    _database((*BOTH_ENDS, "blackhole"), AFTER_COMMIT, RESOLVE),
    _database("restart fast", AFTER_COMMIT, RESOLVE, remark="asked until the server was back"),
    _database(
        ("restart immediate", "restart slow"), AFTER_COMMIT, LOST, 1, remark="after a crash no COMMIT is believed"
    ),
    _database("terminate", AFTER_COMMIT, REPLAY, remark="in a deferred trigger, before the transaction's end"),
    _database(
        "connection limit", AFTER_COMMIT, RESOLVE, remark="and the acknowledgement lost: asked until there was room"
    ),
    _database("connection limit", AFTER_COMMIT, LOST, 1, declared="resolve_timeout=0.5", remark="no room in time"),
    _database(BOTH_ENDS, AFTER_COMMIT, LOST, 1, declared="resolve_commit=False"),
    _database(BOTH_ENDS, AFTER_COMMIT, LOST, 1, declared="COMMIT as text"),
    _database(
        BOTH_ENDS,
        AFTER_COMMIT,
        ((INDETERMINATE, REPLAYED),),
        2,
        declared="resolve_commit=False, idempotent=True",
        remark="twice, as declared",
    ),
    *(
        _database("silent", moment, LIMIT, 0, declared=_SHORT)
        for moment in (IDLE, CONNECTING, LOGGED_IN, FLIGHT, ANSWERED, FIRST_BYTE, MID_QUERY, BETWEEN)
    ),
    _database("silent", BEFORE_COMMIT, LOST, 0, declared=_SHORT, remark="nor can the server be asked"),
    _database("silent", AFTER_COMMIT, LOST, 1, declared=_SHORT, remark="nor can the server be asked"),
)

OVER_PGBOUNCER = (
    _pgbouncer("restart", IDLE, REPLAY),
    _pgbouncer("restart slow", CONNECTING, RETRY),
    _pgbouncer("paused", IDLE, (), remark="for less than `query_wait_timeout`"),
    _pgbouncer(
        ("paused for long", "pool full"),
        IDLE,
        REPLAY + RETRY,
        remark="after `query_wait_timeout`; neither psycopg2 nor a pipeline tells PgBouncer's reason",
    ),
    _pgbouncer("terminate", IDLE, (), remark="PgBouncer takes another server connection"),
    _pgbouncer("restart", FLIGHT, REPLAY, declared=_LIMITED),
    _pgbouncer(("restart", "terminate"), ANSWERED, REPLAY, declared=_LIMITED),
    _pgbouncer("restart slow", MID_QUERY, REPLAY + RETRY),
    _pgbouncer("restart", BETWEEN, REPLAY),
    _pgbouncer("terminate", BETWEEN, REPLAY),
    _pgbouncer("restart", BEFORE_COMMIT, REPLAY),
    _pgbouncer("restart", AFTER_COMMIT, RESOLVE),
    *(
        _pgbouncer("silent", moment, LIMIT, 0, declared=_SHORT)
        for moment in (IDLE, CONNECTING, FLIGHT, ANSWERED, BETWEEN)
    ),
    _pgbouncer("silent", BEFORE_COMMIT, LOST, 0, declared=_SHORT),
    _pgbouncer("silent", AFTER_COMMIT, LOST, 1, declared=_SHORT),
)

OVER_HTTP = (
    _http(BOTH_ENDS, IDLE, REQUESTS, (), 1, remark="seen before the connection is used"),
    _http("blackhole", IDLE, REQUESTS, LOST, 0, remark="a read time-out: it may be slow as well"),
    _http("blackhole", IDLE, REQUESTS, ((INDETERMINATE, REPLAYED),), 1, declared="idempotent=True"),
    _http(("blackhole", "restart slow"), CONNECTING, REQUESTS, RETRY, 1),
    _http(BOTH_ENDS, CONNECTING, REQUESTS, LOST, 0, drivers=(PLAIN,), remark="the request had left"),
    _http(BOTH_ENDS, CONNECTING, REQUESTS, RETRY, 1, drivers=(TLS,), remark="in the handshake: nothing was sent"),
    _http("wrong certificate", CONNECTING, REQUESTS, ((FailureKind.PERMANENT, RAISED),), 0, drivers=(TLS,)),
    _http("pool full", CONNECTING, REQUESTS, ((FailureKind.POOL_EXHAUSTED, RETRIED),), 1),
    _http("restart slow", CONNECTING, "GET", ((UNAVAILABLE, RAISED),), 1, before="POST"),
    _http(BOTH_ENDS, FIRST_BYTE, MAY_BE_SENT_AGAIN, RESEND, 1),
    _http(BOTH_ENDS, FIRST_BYTE, "GET", RESEND, 2, before="POST", remark="the GET alone"),
    _http(BOTH_ENDS, FIRST_BYTE, "POST", LOST, 0, remark="from here it looks like the next line"),
    _http(BOTH_ENDS, GOT_IT, "POST", LOST, 1),
    _http(BOTH_ENDS, GOT_IT, "POST", ((INDETERMINATE, REPLAYED),), 2, declared="idempotent=True"),
    _http(BOTH_ENDS, GOT_IT, MAY_BE_SENT_AGAIN, RESEND, 2),
    _http(BOTH_ENDS, GOT_IT, MAY_BE_SENT_AGAIN, ((STALE, RETRIED),), 2, declared="replays=0"),
    _http("restart slow", GOT_IT, "POST", LOST, 1),
    _http("restart slow", GOT_IT, MAY_BE_SENT_AGAIN, RESEND + RETRY, 2, remark="sent again, it finds the server down"),
    _http(BOTH_ENDS, HEADERS, MAY_BE_SENT_AGAIN, RESEND, 2),
    _http(BOTH_ENDS, HEADERS, "POST", LOST, 1),
    _http("blackhole", HEADERS, REQUESTS, LOST, 1),
    _http((*BOTH_ENDS, "blackhole"), MID_BODY, REQUESTS, LOST, 1, remark="a GET, too: the server had answered"),
    _http(BOTH_ENDS, MID_BODY, "GET", ((INDETERMINATE, REPLAYED),), 2, declared="idempotent=True"),
    _http(("429", "503"), HEADERS, MAY_BE_SENT_AGAIN, RETRY, 2, remark="not before its `Retry-After`"),
    _http(("429", "503"), HEADERS, "POST", ((UNAVAILABLE, RAISED),), 1),
    _http(("502", "504"), HEADERS, MAY_BE_SENT_AGAIN, RETRY, 2),
    _http(("502", "504"), HEADERS, "POST", LOST, 1),
)

OVER_REDIS = (
    _redis((*BOTH_ENDS, "restart"), IDLE, "GET", (), remark="seen before the connection is used"),
    _redis((*BOTH_ENDS, "restart"), IDLE, "INCR", (), 1, remark="seen before the connection is used"),
    _redis("blackhole", IDLE, "GET", RETRY, remark="after `timeout`: nothing was changed"),
    _redis("blackhole", IDLE, "INCR", LOST, remark="after `timeout`: it may be slow as well"),
    _redis("failover", IDLE, "GET", (), remark="a replica answers, until its connections end"),
    _redis("failover", IDLE, "INCR", REPLAY, 1, remark="the replay reaches the new primary"),
    _redis("failover for long", IDLE, "INCR", REPLAY + RETRY, 1, remark="the replay finds a replica, too"),
    _redis((*BOTH_ENDS, "blackhole", "restart slow"), CONNECTING, "GET", RETRY),
    _redis((*BOTH_ENDS, "blackhole", "restart slow"), CONNECTING, "INCR", RETRY, 1),
    _redis("wrong password", CONNECTING, COMMANDS, ((FailureKind.PERMANENT, RAISED),)),
    _redis("pool full", CONNECTING, "INCR", ((FailureKind.POOL_EXHAUSTED, RETRIED),), 1),
    _redis("restart slow", CONNECTING, "GET", ((UNAVAILABLE, RAISED),), 1, before="INCR"),
    _redis(BOTH_ENDS, FIRST_BYTE, "GET", RESEND),
    _redis(BOTH_ENDS, FIRST_BYTE, "GET", RESEND, 1, before="INCR", remark="the GET alone"),
    _redis(BOTH_ENDS, FIRST_BYTE, "INCR", LOST, remark="from here it looks like the next line"),
    _redis(BOTH_ENDS, GOT_IT, ("INCR", "MULTI, INCR, EXEC", "EVAL"), LOST, 1),
    _redis(BOTH_ENDS, GOT_IT, "INCR", ((INDETERMINATE, REPLAYED),), 2, declared="idempotent=True"),
    _redis(BOTH_ENDS, GOT_IT, "GET", RESEND),
    _redis(BOTH_ENDS, GOT_IT, "GET", ((STALE, RETRIED),), declared="replays=0"),
    _redis("restart slow", GOT_IT, "GET", RESEND + RETRY, remark="sent again, it finds the server down"),
    _redis("restart slow", GOT_IT, "INCR", LOST, 1),
    _redis(BOTH_ENDS, MID_ANSWER, "GET", RESEND),
    _redis(BOTH_ENDS, MID_ANSWER, "INCR", LOST, 1),
    _redis("primary killed", IDLE, "GET", (), remark="seen before the connection is used"),
    _redis("primary killed", IDLE, "INCR", (), 1, remark="seen before the connection is used"),
    _redis("primary killed for long", IDLE, "GET", (), remark="a replica answers"),
    _redis("primary killed for long", IDLE, "INCR", RETRY, 1, remark="a replica refuses to write"),
    _redis("primary killed", CONNECTING, "GET", RETRY),
    _redis("primary killed", CONNECTING, "INCR", RETRY, 1),
    _redis("primary killed", FIRST_BYTE, "GET", RESEND),
    _redis("primary killed", FIRST_BYTE, "INCR", LOST, remark="from here it looks like the next line"),
    _redis("primary killed", GOT_IT, ("INCR", "MULTI, INCR, EXEC", "EVAL"), LOST, 1, remark="the replica has it"),
    _redis("primary killed", GOT_IT, "INCR", ((INDETERMINATE, REPLAYED),), 2, declared="idempotent=True"),
    _redis("primary killed", GOT_IT, "GET", RESEND),
    _redis(("primary killed", "primary killed for long"), MID_ANSWER, "GET", RESEND),
    _redis("primary killed", MID_ANSWER, "GET", RESEND, 1, before="INCR", remark="the GET alone"),
    _redis(("primary killed", "primary killed for long"), MID_ANSWER, "INCR", LOST, 1),
    *(_redis("silent", moment, COMMANDS, LIMIT, declared=_SHORT) for moment in (IDLE, CONNECTING)),
    _redis("silent", GOT_IT, "GET", LIMIT, declared=_SHORT),
    _redis("silent", GOT_IT, "INCR", LIMIT, 1, declared=_SHORT),
    _redis("silent", MID_ANSWER, "GET", LIMIT, declared=_SHORT),
)


def parameters(*cells: Cell) -> list[Any]:
    """Return a test's arguments for everything that the cells name: cell, break, driver, method."""
    found = []
    for cell in cells:
        for broken, driver, method in itertools.product(cell.breaks, cell.drivers, cell.methods):
            words = (broken, cell.moment, cell.declared, cell.before and f"after {cell.before}", method, driver)
            marks = [pytest.mark.xfail(reason=cell.defect, strict=True)] if cell.defect else []
            found.append(pytest.param(cell, broken, driver, method, id=", ".join(filter(None, words)), marks=marks))
    return found


def with_clients(parameters: Sequence[Any], clients: Sequence[str], asynchronous: Sequence[str]) -> list[Any]:
    """Return the parameters with each client, and with each asynchronous one over the first of a cell's drivers."""
    found = []
    for each in parameters:
        cell, _, driver, _ = each.values
        for client in (*clients, *(asynchronous if driver == cell.drivers[0] else ())):
            found.append(pytest.param(*each.values, client, id=f"{each.id}, {client}", marks=each.marks))
    return found


def markdown() -> str:
    """Return the table for the documentation."""
    rows = [
        f"| {_over(cell)} | {', '.join(cell.breaks)} | {cell.moment} | {_circumstances(cell)} | {_steps(cell)} "
        f"| {_saw(cell)} | {_remark(cell)} |"
        for cell in (*OVER_DATABASE, *OVER_PGBOUNCER, *OVER_HTTP, *OVER_REDIS)
    ]
    head = "| over | what broke | when | circumstances | what was done | the server saw | remark |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def _over(cell: Cell) -> str:
    if cell.drivers == HTTP:
        return "HTTP, plain and TLS"
    if cell.drivers == REDIS:
        return "Redis"
    if cell.drivers == DATABASE:
        return "PgBouncer" if cell.pgbouncer else "PostgreSQL"
    return f"{'PgBouncer, ' if cell.pgbouncer else ''}{', '.join(cell.drivers)}"


def _circumstances(cell: Cell) -> str:
    requests = ("; " if cell.drivers == REDIS else ", ").join(filter(None, cell.methods))
    before = f"after {_code(cell.before)}" if cell.before else ""
    declared = ", ".join(_code(word) for word in cell.declared.split(", ")) if cell.declared else ""
    return "; ".join(filter(None, (requests, before, declared)))


def _code(word: str) -> str:
    return f"`{word}`" if "=" in word or "(" in word else word


def _steps(cell: Cell) -> str:
    if not cell.steps:
        return UNNOTICED
    return ", then ".join(done if kind is None else f"{kind.value}: {done}" for kind, done in cell.steps)


def _saw(cell: Cell) -> str:
    counts = ((cell.rows, "row"), (cell.requests, "request"), (cell.increments, "increment"))
    return ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts if count is not None)


def _remark(cell: Cell) -> str:
    return "; ".join(filter(None, (cell.remark, cell.defect and "a known defect: not so yet")))


def written(text: str) -> str:
    """Return the page's text with its table as it should be.

    Raises:
        ValueError: The page has not the two marks.
    """
    before, first, rest = text.partition(MARK)
    _, second, after = rest.partition(MARK)
    if not (first and second):
        raise ValueError(f"{PAGE}: the table's two marks are not there")
    return f"{before}{MARK}\n\n{markdown()}\n\n{MARK}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(markdown())
