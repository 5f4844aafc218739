"""Numbers have bounds, checked where they are declared."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import httpx
import pytest

from workerpools import ConfigurationError, Deadline, RetryPolicy, WorkerPools
from workerpools._pools.lifetime import Lifetime
from workerpools._values import WEEK, YEAR, number, seconds, shown, whole
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine

NEVER: list[Any] = [10**400, -(10**400), 10**5000, 1e308, float("nan"), float("inf"), "5", b"5", True, Decimal(5), [5]]


def closing(timeout: Any) -> None:
    WorkerPools().close(timeout)


def closing_one(timeout: Any) -> None:
    WorkerPools().add(lambda: object(), name="api").close(timeout)


DECLARED: dict[str, Callable[[Any], object]] = {
    "RetryPolicy: replays": lambda value: RetryPolicy(replays=value),
    "RetryPolicy: max_retries": lambda value: RetryPolicy(max_retries=value),
    "RetryPolicy: backoff": lambda value: RetryPolicy(backoff=value),
    "RetryPolicy: backoff_max": lambda value: RetryPolicy(backoff_max=value),
    "check_after": lambda value: Lifetime(check_after=value),
    "max_idle": lambda value: Lifetime(max_idle=value),
    "max_lifetime": lambda value: Lifetime(max_lifetime=value),
    "max_lifetime_jitter": lambda value: Lifetime(max_lifetime_jitter=value),
    "HttpxClient: timeout: read": lambda value: HttpxClient(timeout=httpx.Timeout(1.0, read=value)),
    "HttpxClient: max_connections": lambda value: HttpxClient(max_connections=value),
    "HttpxClient: leak_after": lambda value: HttpxClient(leak_after=value),
    "SQLAlchemyEngine: connect_timeout": lambda value: SQLAlchemyEngine("sqlite://", connect_timeout=value),
    "SQLAlchemyEngine: acquire_timeout": lambda value: SQLAlchemyEngine("sqlite://", acquire_timeout=value),
    "SQLAlchemyEngine: resolve_timeout": lambda value: SQLAlchemyEngine("sqlite://", resolve_timeout=value),
    "SQLAlchemyEngine: pool_size": lambda value: SQLAlchemyEngine("sqlite://", pool_size=value),
    "SQLAlchemyEngine: max_overflow": lambda value: SQLAlchemyEngine("sqlite://", max_overflow=value),
    "SQLAlchemyEngine: leak_after": lambda value: SQLAlchemyEngine("sqlite://", leak_after=value),
    "WorkerPools.close(): timeout": closing,
    "Resource.close(): timeout": closing_one,
    "Deadline.clamp(): timeout": Deadline().clamp,
}


@pytest.mark.parametrize("declare", DECLARED.values(), ids=DECLARED)
@pytest.mark.parametrize("value", [*NEVER, -2], ids=shown)
def test_no_number_is_taken_as_it_comes(declare: Callable[[Any], object], value: Any) -> None:
    """The message names the option, the value and what is wanted; it is no page of digits."""
    (name,) = (each for each, known in DECLARED.items() if known is declare)
    with pytest.raises(ConfigurationError) as caught:
        declare(value)
    message = str(caught.value)
    assert message.startswith(f"{name}={shown(value)}: wanted a ")
    assert len(message) < 200


@pytest.mark.parametrize("declare", DECLARED.values(), ids=DECLARED)
def test_small_numbers_are_taken(declare: Callable[[Any], object]) -> None:
    """One is right everywhere."""
    declare(1)


@pytest.mark.parametrize("value", NEVER, ids=shown)
def test_what_is_no_number(value: Any) -> None:
    """Or too large a one."""
    assert number(value, 0, YEAR) is None


@pytest.mark.parametrize(
    ("value", "above", "found"), [(0, False, 0.0), (0, True, None), (-0.1, False, None), (7, True, 7.0)]
)
def test_the_lowest(value: float, above: bool, found: float | None) -> None:
    """Is in, or just out."""
    assert number(value, 0, 10, above=above) == found


def test_the_highest() -> None:
    """Is in."""
    assert seconds(WEEK, "x", most=WEEK) == WEEK
    assert whole(3, "x", most=3) == 3
    with pytest.raises(ConfigurationError, match=r"^x=604801: wanted .* at least 0 and at most 604800 "):
        seconds(604801, "x", most=WEEK)
    with pytest.raises(ConfigurationError, match=r"^x=2\.0: wanted .* of at least 0, and at most 3, or None$"):
        whole(2.0, "x", most=3, optional=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Fraction(1, 2), "a value of the type Fraction"),
        (10**400, "an integer of 1329 bits"),
        (None, "None"),
        ("https://me:hunter2@host/", "'https://me:***@host/'"),
        ("x" * 1000, repr("x" * 100)),
    ],
)
def test_what_is_shown_of_a_value(value: Any, text: str) -> None:
    """Nothing secret, and nothing long."""
    assert shown(value) == text


@pytest.mark.skipif(not hasattr(select, "poll"), reason="without poll() sockets count in another way")
def test_sockets_keep_the_longest_wait() -> None:
    """They count milliseconds in 32 bits: a wait of 49.7 days ends after a fraction of a second."""
    assert WEEK * 1000 < 2**31
    one, other = socket.socketpair()
    with one, other:
        one.settimeout(2**32 / 1000 + 0.1)
        with pytest.raises(TimeoutError):
            one.recv(1)


def test_a_pool_that_is_closed_with_a_wrong_timeout_stays_open() -> None:
    """The caller can do it again."""
    pools = WorkerPools()
    resource = pools.add(lambda: object(), name="api")
    resource.get()
    for close in (pools.close, resource.close):
        with pytest.raises(ConfigurationError):
            close(1e12)
        assert resource.is_open
    pools.close(WEEK)
    assert not resource.is_open


def test_the_longest_delay_of_many_retries() -> None:
    """Is the highest bound, whatever the number of retries."""
    assert RetryPolicy(max_retries=1_000_000).longest_delay == 60.0


def test_a_deadline_clamps() -> None:
    """What is left where that is less."""
    assert Deadline(time.monotonic()).clamp(WEEK) == 0.0
