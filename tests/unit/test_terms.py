"""What a Celery task says about running again, and what its request tells."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry

from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools._celery.terms import REPLAYS, TaskTerms, check_delays


@pytest.fixture
def app() -> Celery:
    made = Celery("terms", broker="memory://", set_as_current=False)
    WorkerPools(made)
    return made


def terms(app: Celery, **options: Any) -> TaskTerms:
    # Celery gives a shared task to every app of the process, those of other tests included.
    @app.task(base=PooledTask, name="shop.task", shared=False, **options)
    def task() -> None: ...

    return TaskTerms(app.tasks["shop.task"])


def test_celerys_own_ways_to_end_a_run(app: Celery) -> None:
    """They pass through, whatever is behind them."""
    asked = terms(app)
    assert all(asked.is_control(error) for error in (Retry(), Ignore(), Reject()))
    assert not asked.is_control(ValueError())


@pytest.mark.parametrize(
    ("options", "request_", "error", "reason"),
    [
        ({}, None, OSError(), "called directly"),
        ({}, Context(called_directly=True), OSError(), "called directly"),
        ({}, Context(called_directly=False, is_eager=True), OSError(), "eagerly"),
        ({}, Context(called_directly=False), OSError(), ""),
        ({"autoretry_for": (OSError,)}, Context(called_directly=False), ConnectionError(), "autoretry_for"),
        ({"autoretry_for": (KeyError,)}, Context(called_directly=False), OSError(), ""),
        (
            {"autoretry_for": (OSError,), "dont_autoretry_for": (ConnectionError,)},
            Context(called_directly=False),
            ConnectionError(),
            "",
        ),
    ],
)
def test_who_has_a_broker_to_go_back_to(
    app: Celery, options: dict[str, Any], request_: Any, error: Exception, reason: str
) -> None:
    """And who leaves it to Celery."""
    found = terms(app, **options).no_broker(request_, error)
    assert reason in found
    assert bool(found) is bool(reason)


@pytest.mark.parametrize("kind", [str, datetime])
def test_limits_of_a_request(app: Celery, kind: type) -> None:
    """The nearest time limit, and the time until it expires, in the shapes in which Celery delivers them."""
    when: Any = datetime.now(timezone.utc) + timedelta(seconds=60)
    expires = when.isoformat() if kind is str else when
    limit, seconds = terms(app).limits(Context(timelimit=[30, 10], expires=expires))
    assert limit == 10
    assert seconds is not None
    assert 50 < seconds <= 60
    assert terms(app).limits(Context(timelimit=(None, None), expires=None)) == (None, None)
    assert terms(app).limits(None) == (None, None)
    naive: Any = (when.replace(tzinfo=None)).isoformat()
    _, seconds = terms(app).limits(Context(expires=naive))
    assert seconds is not None
    assert 50 < seconds <= 60


@pytest.mark.parametrize(
    ("headers", "count"), [(None, 0), ({}, 0), ({REPLAYS: 2}, 2), ({REPLAYS: "x"}, 0), ({REPLAYS: -1}, 0)]
)
def test_replays_are_carried_in_a_header(app: Celery, headers: dict[str, Any] | None, count: int) -> None:
    """Whatever is in the header, it is a number from 0."""
    request = Context(headers=headers)
    asked = terms(app)
    assert asked.replays(request) == count
    asked.carry(request, 5)
    assert asked.replays(request) == 5
    assert asked.replays(None) == 0
    asked.carry(None, 1)


@pytest.mark.parametrize(
    ("broker", "policy", "options", "warned"),
    [
        ("redis://localhost", RetryPolicy(backoff=4000, backoff_max=4000), {}, True),
        ("rediss://localhost", RetryPolicy(backoff=4000, backoff_max=4000), {}, True),
        ("redis://localhost", RetryPolicy(), {}, False),
        ("redis://localhost", RetryPolicy(), {"visibility_timeout": 7}, True),
        ("redis://localhost", RetryPolicy(backoff=4000, backoff_max=4000), {"visibility_timeout": 7200}, False),
        ("redis://localhost", RetryPolicy(backoff=4000, backoff_max=4000, max_retries=0), {}, False),
        ("redis://localhost", False, {}, False),
        ("memory://", RetryPolicy(backoff=4000, backoff_max=4000), {}, False),
        ("amqp://localhost", RetryPolicy(backoff=4000, backoff_max=4000), {}, False),
    ],
)
def test_a_delay_beyond_the_visibility_timeout_is_warned_of(
    broker: str, policy: Any, options: dict[str, Any], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """At the worker's start, by the task's name: the broker would deliver it twice."""
    app = Celery("terms", broker=broker, set_as_current=False)
    app.conf.broker_transport_options = options
    pools = WorkerPools(app)
    terms(app, replay=policy)
    # Celery gives the app what other tests have shared, too.
    found = [warning for warning in check_delays(app) if warning.startswith("shop.task: ")]
    assert bool(found) is warned
    assert not warned or "shop.task: a retry may wait" in found[0]
    with caplog.at_level(logging.WARNING, logger="workerpools"):
        pools.worker_starts(type("Worker", (), {"app": app})())
    assert [message for message in caplog.messages if message.startswith("shop.task: ")] == found
