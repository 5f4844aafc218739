"""What a Celery task says about running again, and what its request tells."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry

from workerpools import ConfigurationError, PooledTask, RetryPolicy, WorkerPools
from workerpools._celery.lifecycle import keep_limits
from workerpools._celery.request import REPLAYS, TaskTerms, check_times


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
@pytest.mark.parametrize("aware", [True, False])
def test_when_a_request_expires(app: Celery, kind: type, aware: bool) -> None:
    """In the shapes in which Celery delivers it."""
    when: Any = datetime.now(timezone.utc) + timedelta(seconds=60)
    if not aware:
        when = when.replace(tzinfo=None)
    seconds = terms(app).expires_in(Context(expires=when.isoformat() if kind is str else when))
    assert seconds is not None
    assert 50 < seconds <= 60
    assert terms(app).expires_in(Context()) is None
    assert terms(app).expires_in(Context(expires="soon")) is None
    assert terms(app).expires_in(None) is None


@pytest.mark.parametrize(
    ("request_", "options", "of_worker", "seconds"),
    [
        ({}, {}, (None, None), None),
        ({"timelimit": [30, 10]}, {}, (None, None), 9.9),
        ({"timelimit": [30, None]}, {"soft_time_limit": 20}, (None, None), 19.9),
        ({"timelimit": [None, 10]}, {"soft_time_limit": 5}, (None, None), 9.9),
        ({}, {"time_limit": 8}, (None, 20), 7.9),
        ({}, {}, (60, 40), 39.9),
        ({}, {"soft_time_limit": 50}, (60, 40), 49.9),
        ({"called_directly": True, "timelimit": [30, 10]}, {"soft_time_limit": 5}, (60, 40), None),
    ],
)
def test_how_long_a_run_may_take(
    app: Celery,
    request_: dict[str, Any],
    options: dict[str, Any],
    of_worker: tuple[float | None, float | None],
    seconds: float | None,
) -> None:
    """The message's own limits, else the task's, else the worker's; minus the margin. Not for a direct call."""
    time_limit, soft_time_limit = of_worker
    worker = type("Worker", (), {"app": app, "time_limit": time_limit, "soft_time_limit": soft_time_limit})()
    keep_limits(worker)
    request: Any = Context(**{"called_directly": False, **request_})
    assert terms(app, **options).allowed(request, 0.0) == seconds


def test_an_expiry_is_counted_from_now(app: Celery) -> None:
    """The limits count from the start of the run, whenever its deadline is asked for first."""
    request = Context(called_directly=False, expires=datetime.now(timezone.utc) + timedelta(seconds=4))
    asked = terms(app)
    seconds = asked.allowed(request, 6.0)
    assert seconds is not None
    assert 8 < seconds <= 9.9
    request.timelimit = [None, 8]
    assert asked.allowed(request, 6.0) == 7.9


def test_a_run_without_any_worker_seen_has_the_limits_of_the_settings(app: Celery) -> None:
    """As in a spawned child, which never sees its parent's command line; the margin is a setting."""
    app.conf.task_soft_time_limit = 30
    app.conf.workerpools_deadline_margin = 5
    assert terms(app).allowed(Context(called_directly=False), 0.0) == 25
    app.conf.workerpools_deadline_margin = "soon"
    with pytest.raises(ConfigurationError, match="workerpools_deadline_margin is 'soon'"):
        terms(app).allowed(Context(called_directly=False), 0.0)


@pytest.mark.parametrize(
    ("options", "soft", "warned"),
    [
        ({"time_limit": 10}, 60, True),
        ({"time_limit": 10, "soft_time_limit": 5}, 60, False),
        ({"time_limit": 90}, 60, False),
        ({}, 60, False),
    ],
)
def test_a_hard_limit_that_is_not_kept_is_warned_of(
    app: Celery, options: dict[str, Any], soft: float, warned: bool
) -> None:
    """Below the worker's soft limit."""
    keep_limits(type("Worker", (), {"app": app, "time_limit": None, "soft_time_limit": soft})())
    terms(app, **options)
    # Celery gives the app what other tests have shared, too.
    found = [warning for warning in check_times(app) if warning.startswith("shop.task: ")]
    assert bool(found) is warned
    assert not warned or "shop.task: its time_limit of 10 s is below the worker's soft limit of 60 s" in found[0]


def test_a_limit_beyond_the_visibility_timeout_is_warned_of() -> None:
    """The broker would deliver the task again while it runs."""
    app = Celery("terms", broker="redis://localhost", set_as_current=False)
    terms(app, time_limit=7200)
    assert any("shop.task: it may run for 7200 s" in warning for warning in check_times(app))


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
    ("options", "retries", "again"),
    [
        ({}, 0, False),
        ({"autoretry_for": (OSError,)}, 0, True),
        ({"autoretry_for": (OSError,)}, 2, True),
        ({"autoretry_for": (OSError,)}, 3, False),
        ({"autoretry_for": (OSError,), "max_retries": 0}, 0, False),
        ({"autoretry_for": (OSError,), "max_retries": None}, 99, True),
        ({"autoretry_for": (OSError,), "retry_kwargs": {"max_retries": 5}}, 4, True),
        ({"autoretry_for": (OSError,), "retry_kwargs": {"max_retries": 5}}, 5, False),
        ({"autoretry_for": (OSError,), "dont_autoretry_for": (ConnectionError,)}, 0, False),
    ],
)
def test_what_celery_runs_again(app: Celery, options: dict[str, Any], retries: int, again: bool) -> None:
    """By its own count, which is not ours; called directly, nothing."""
    asked = terms(app, **options)
    assert bool(asked.runs_again(Context(called_directly=False, retries=retries), ConnectionError())) is again
    assert asked.runs_again(Context(called_directly=True, retries=retries), ConnectionError()) == ""
    assert asked.runs_again(None, ConnectionError()) == ""


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, RetryPolicy().max_retries),
        ({"max_retries": 0}, 0),
        ({"max_retries": 3}, 3),
        ({"max_retries": 1000}, RetryPolicy().max_retries),
        ({"max_retries": None}, RetryPolicy().max_retries),
        ({"max_retries": 1000, "replay": RetryPolicy(max_retries=2000)}, 1000),
        ({"max_retries": 5, "replay": RetryPolicy(max_retries=2)}, 2),
    ],
)
def test_a_tasks_own_max_retries(app: Celery, options: dict[str, Any], most: int) -> None:
    """It bounds ours; Celery's default of 3, which nobody wrote, does not."""
    policy = terms(app, **options).policy
    assert policy is not None
    assert policy.max_retries == most


def test_max_retries_of_a_base_and_of_a_task_that_exists(app: Celery) -> None:
    """Wherever it is said."""
    base = type("Patient", (PooledTask,), {"abstract": True, "max_retries": 4})

    @app.task(base=base, name="shop.based", shared=False)
    def task() -> None: ...

    asked = TaskTerms(app.tasks["shop.based"])
    assert asked.policy == RetryPolicy(max_retries=4)
    app.tasks["shop.based"].max_retries = 1
    assert asked.policy == RetryPolicy(max_retries=1)
    assert (
        TaskTerms(
            type(
                "Off", (), {"name": "t", "replay": False, "max_retries": 1, "app": Celery("off", set_as_current=False)}
            )()
        ).policy
        is None
    )


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
    found = [warning for warning in check_times(app) if warning.startswith("shop.task: ")]
    assert bool(found) is warned
    assert not warned or "shop.task: a retry may wait" in found[0]
    with caplog.at_level(logging.WARNING, logger="workerpools"):
        pools.worker_starts(type("Worker", (), {"app": app})())
    assert [message for message in caplog.messages if message.startswith("shop.task: ")] == found
