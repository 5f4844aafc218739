"""Figures in the pages' prose, each from the code, or the benchmark, that it is about."""

from __future__ import annotations

import inspect
import json
import math
import re
from typing import Any

import pytest
import redis
import sqlalchemy
import sqlalchemy.pool
from celery.concurrency.asynpool import PROC_ALIVE_TIMEOUT
from requests.adapters import DEFAULT_POOLSIZE
from uvicorn import Config

from tests.docs.test_told import page
from tests.support.paths import ROOT
from workerpools import RetryPolicy
from workerpools._celery.health import STALLED_AFTER
from workerpools._celery.request import DEADLINE_MARGIN
from workerpools._celery.worker import ALERT_INTERVAL
from workerpools._check import fork_hazards
from workerpools._pools.shared import CLOSE_TIMEOUT
from workerpools._process.event_loop import CLEANUP
from workerpools._stats.alerts import LOOKS
from workerpools._stats.metrics import BOUNDS
from workerpools._stats.rules import Thresholds
from workerpools.adapter import ExecutionPool
from workerpools.flower import _page
from workerpools.httpx import DEFAULT_TIMEOUT, HttpxClient
from workerpools.httpx._client import TOKEN_WAIT
from workerpools.httpx._streams import _MOST
from workerpools.redis import RedisClient
from workerpools.requests import RequestsSession
from workerpools.sqlalchemy import MYSQL_DEFAULTS, SQLAlchemyEngine, connect_defaults, pool_defaults
from workerpools.sqlalchemy._timeouts import FLOOR, slack

_WORDS = [
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
]


def word(number: float) -> str:
    """Return a whole number in words."""
    assert number == int(number)
    return _WORDS[int(number)]


def default(function: Any, name: str) -> Any:
    """Return the default of a parameter."""
    return inspect.signature(function).parameters[name].default


def median(benchmark: str, figure: str) -> float:
    """Return what a benchmark has measured."""
    text = (ROOT / "benchmarks" / "results" / f"{benchmark}.json").read_text(encoding="utf-8")
    return float(json.loads(text)["ratios"][figure]["median"])


PREFORK = pool_defaults(ExecutionPool("prefork", 1), 10.0)
OWN = PREFORK["pool_size"] + PREFORK["max_overflow"]
PLAIN = sqlalchemy.create_engine("postgresql+psycopg2://app@db/shop").pool
assert isinstance(PLAIN, sqlalchemy.pool.QueuePool)
PLAIN_MOST = PLAIN.size() + PLAIN._max_overflow
DRIVER = connect_defaults(sqlalchemy.make_url("postgresql+psycopg2://app@db/shop"), resource="db", connect_timeout=5.0)
GONE = DRIVER["keepalives_idle"] + DRIVER["keepalives_interval"] * DRIVER["keepalives_count"]
SHARED = {name: getattr(_page, name) for name in ("LEAST_INTERVAL", "UNHEARD_AFTER", "FORGOTTEN_AFTER")}
REDIS = inspect.signature(redis.Redis).parameters
PER_TASK = {
    "database": median("throughput", "database, ours over an engine a task"),
    "HTTP": median("throughput", "HTTP, ours over a client a task"),
}
SCRIPT = (ROOT / "workerpools" / "flower" / "static" / "pools.js").read_text(encoding="utf-8")

SAID: list[tuple[str, str]] = [
    ("alerts", f"Every {word(ALERT_INTERVAL)} seconds a worker checks"),
    ("alerts", f"`workerpools_alert_clear_after`, {Thresholds().clear_after:.0f} s"),
    ("alerts", f"at every check, and at {word(LOOKS)} checks or more"),
    ("async", f"waits at most {CLEANUP:.0f} seconds for its clean-up"),
    ("check", f"a time limit of {fork_hazards.TIMEOUT:.0f} s"),
    ("deadlines", f"less a margin of {DEADLINE_MARGIN} s"),
    ("deadlines", f"each statement then has {FLOOR:.0f} s"),
    ("deadlines", f"a database connection after {GONE} s (`tcp_user_timeout` and keepalives)"),
    ("deadlines", f"the next attempt to connect takes {default(SQLAlchemyEngine, 'connect_timeout'):.0f} s"),
    ("deadlines", f"httpx waits {DEFAULT_TIMEOUT.read:.0f} s for each read"),
    ("deadlines", f"`read_timeout` and `write_timeout` ({MYSQL_DEFAULTS['read_timeout']} s) bound the wait"),
    ("failures", f"no answer for `resolve_timeout` ({default(SQLAlchemyEngine, 'resolve_timeout'):.0f} s)"),
    ("failures", f"{word(1 + RetryPolicy().replays + RetryPolicy().max_retries)} times with the defaults"),
    ("flower", f"refreshes itself every {int(re.findall('INTERVAL = ([0-9]+)', SCRIPT)[0]) // 1000} seconds"),
    ("flower", f"at most every {SHARED['LEAST_INTERVAL']:.0f} seconds however many pages are open"),
    ("httpx", f"at most {_MOST}, and one until the server has announced it"),
    ("httpx", f"for the `pool` timeout, {DEFAULT_TIMEOUT.pool:.0f} s by default"),
    ("httpx", f"wait for it ({TOKEN_WAIT:.0f} s at most)"),
    ("kubernetes", f"the main loop has not turned for {STALLED_AFTER:.0f} s"),
    ("moving", f"a child has {OWN} connections in place of {PLAIN_MOST}"),
    ("operations", f"keep {8 * 4 * PREFORK['pool_size']} connections and need room for {8 * 4 * OWN}"),
    ("operations", f"the main loop has not turned for {STALLED_AFTER:.0f} seconds"),
    ("operations", f"most, {CLOSE_TIMEOUT:.0f} s by default"),
    ("redis", f"| {REDIS['socket_timeout'].default:.0f} s for each read |"),
    ("redis", f"| {REDIS['socket_connect_timeout'].default:.0f} s for each step |"),
    ("redis", f"| retries by the driver | 0 | {REDIS['retry'].default._retries} |"),
    ("redis", f"a connection is replaced after | {default(RedisClient, 'max_lifetime') / 60:.0f} min"),
    ("requests", f"a connection is replaced after | {default(RequestsSession, 'max_lifetime') / 60:.0f} min"),
    ("sqlalchemy", f"and {MYSQL_DEFAULTS['write_timeout']} s for `read_timeout` and `write_timeout`"),
    ("statistics", f"{', '.join(f'{bound:g}' for bound in BOUNDS[:-1])} and {BOUNDS[-1]:g} s"),
    ("troubleshooting", f"bound the last one to {GONE} seconds"),
    ("troubleshooting", f"Plain engines in eight children may open {PLAIN_MOST} connections each"),
    ("troubleshooting", f"uvicorn {Config('').timeout_keep_alive} s"),
    ("troubleshooting", f"more threads than `pool_maxsize` ({DEFAULT_POOLSIZE}) use one `requests.Session`"),
    ("troubleshooting", f"blocks for longer than {word(PROC_ALIVE_TIMEOUT)} seconds"),
    ("why", f"about {word(round(PER_TASK['database']))} times as many tasks of one SELECT"),
    ("why", f"about {word(round(PER_TASK['HTTP']))} times as many tasks of one GET"),
    ("why", f"replaced after {word(default(HttpxClient, 'max_lifetime') / 60)} minutes"),
    ("why", f"takes longer than {word(PROC_ALIVE_TIMEOUT)} seconds"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "sentence"), SAID, ids=[f"{name}: {sentence}"[:70] for name, sentence in SAID])
def test_what_a_page_says(name: str, sentence: str) -> None:
    """In its words."""
    assert sentence in page(name)


def test_the_keep_alive_of_gunicorn() -> None:
    """It is the demo's server."""
    config = pytest.importorskip("gunicorn.config")
    assert f"by default gunicorn {config.Keepalive.default} s" in page("troubleshooting")


def test_numbers_in_words() -> None:
    """Half a minute, a twentieth, an hour."""
    assert 25 <= GONE + default(SQLAlchemyEngine, "connect_timeout") <= 35
    assert "holds a task for about half a minute" in page("deadlines")
    assert [slack(remaining) for remaining in (2.0, 10.0, 20.0, 600.0)] == [0.1, 0.5, 1.0, 1.0]
    assert "at most a twentieth of the remaining time, and no more than 1 s" in page("deadlines")
    assert SHARED["FORGOTTEN_AFTER"] == 3600.0
    assert "and removed after an hour" in page("flower")
    assert SHARED["UNHEARD_AFTER"] == 60.0
    assert "for a minute after the last query" in page("flower")
    assert math.isclose(DRIVER["tcp_user_timeout"] / 1000, GONE)
