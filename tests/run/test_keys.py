"""Which key a request is sent with, in a run and in the replays after it."""

from __future__ import annotations

import threading

import pytest

from workerpools._run.keys import MAX_KEPT, Keys, derive

PAY = "POST https://pay.example/charges"
REFUND = "POST https://pay.example/refunds"


@pytest.mark.parametrize(
    ("runs", "keys"),
    [
        # Each run: (place, content, the body's key) of its requests, and what they are sent with.
        ([[(PAY, b"5", "a")], [(PAY, b"5", "b")], [(PAY, b"5", "c")]], [["a"], ["a"], ["a"]]),
        ([[(PAY, b"5", "a")], [(PAY, b"5", "a")]], [["a"], ["a"]]),
        # Two equal charges of one run are two.
        ([[(PAY, b"5", "a"), (PAY, b"5", "b")], [(PAY, b"5", "c"), (PAY, b"5", "d")]], [["a", "b"], ["a", "b"]]),
        # The replay comes further than the run before, and the next one knows what it sent.
        (
            [[(PAY, b"5", "a")], [(PAY, b"5", "b"), (REFUND, b"1", "c")], [(PAY, b"5", "d"), (REFUND, b"1", "e")]],
            [["a"], ["a", "c"], ["a", "c"]],
        ),
        # Keys of the user's own that are the same in each run, in another order.
        (
            [[(PAY, b"5", "o1"), (PAY, b"7", "o2")], [(PAY, b"7", "o2"), (PAY, b"5", "o1")]],
            [["o1", "o2"], ["o2", "o1"]],
        ),
        ([[(PAY, b"5", "a")], [(REFUND, b"5", "b")]], [["a"], ["b"]]),
        # It may be the same charge: nothing proves that it is another one.
        ([[(PAY, b"5", "a")], [(PAY, b"6", "b")]], [["a"], [None]]),
        ([[(PAY, None, "a")]], [[None]]),
        ([[(PAY, None, "derived")], [(PAY, b"x", "derived")]], [["derived"], ["derived"]]),
        # A request that is sent again in the same run, after a challenge say.
        ([[(PAY, b"5", "a"), (PAY, b"5", "a")], [(PAY, b"5", "b"), (PAY, b"5", "b")]], [["a", "a"], ["a", "a"]]),
    ],
)
def test_the_key(runs: list[list[tuple[str, bytes | None, str]]], keys: list[list[str | None]]) -> None:
    """The n-th request of a replay to the same place with the same content has the key of the first run's n-th."""
    kept = Keys()
    kept.derived.add("derived")
    found = []
    for run in runs:
        if found:
            kept.run_again()
        found.append([kept.keep(*request) for request in run])
    assert found == keys


def test_a_retry_knows_what_was_sent() -> None:
    """In another process; the contents of requests do not travel with it."""
    first = Keys()
    first.keep(PAY, b"secret", "a")
    again = Keys([list(each) for each in first.sent])
    assert "secret" not in str(first.sent)
    assert (again.keep(PAY, b"secret", "b"), again.keep(PAY, b"other", "c")) == ("a", "c")
    assert Keys([list(each) for each in first.sent]).keep(PAY, b"other", "c") is None


def test_threads_have_no_order() -> None:
    """A key of a second thread is not kept; one that is derived needs no order."""
    kept = Keys()
    kept.derived.add("derived")
    assert kept.keep(PAY, b"5", "a") == "a"
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.extend([kept.keep(PAY, b"5", "b"), kept.keep(PAY, b"5", "derived")]))
    thread.start()
    thread.join()
    assert found == [None, "derived"]


def test_not_without_end() -> None:
    kept = Keys()
    found = [kept.keep(PAY, b"%d" % number, str(number)) for number in range(MAX_KEPT + 1)]
    assert found[-2:] == [str(MAX_KEPT - 1), None]


def test_a_derived_key() -> None:
    """The same for the same task and name, another one for any other; no part runs into the next."""
    keys = [derive(*parts) for parts in (("1", "t", "charge"), ("1", "t", "refund"), ("2", "t", "charge"))]
    keys += [derive("1", "tc", "harge"), derive("1t", "", "charge"), derive("", "1", "t:charge")]
    assert len(set(keys)) == len(keys)
    assert derive("1", "t", "charge") == keys[0]
