"""An app whose tasks are delivered as a worker delivers them, and a record of what became of each delivery."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

from celery.exceptions import Retry, SoftTimeLimitExceeded
from celery.worker.request import Request

from tests.chaos import table
from tests.chaos.table import Step
from tests.support.errands import Errands
from tests.support.shop import Shop
from workerpools import FailureKind, RetryPolicy, classify
from workerpools.events import EventKind

_DONE = {
    EventKind.ATTEMPT_REPLAYED: table.REPLAYED,
    EventKind.REQUEST_REPLAYED: table.SENT_AGAIN,
    EventKind.TASK_RETRIED: table.RETRIED,
    EventKind.REPLAY_REFUSED: table.RAISED,
}


class ChaosShop(Shop):
    """One app, one task, a memory broker, and what happened.

    Attributes:
        runs: How often the body has begun.
        raised: What came out of each delivery; None where it succeeded.
        errands: The test's thread, for what the body wants done there.
        at: What to do at a moment of the body's, once.
    """

    def __init__(self) -> None:
        super().__init__(eager=False)
        self.runs = 0
        self.raised: list[BaseException | None] = []
        self.errands = Errands()
        self.at: dict[str, Callable[[], object]] = {}

    def declare(self, body: Callable[[Any], object], declared: str) -> None:
        """Make the task.

        Args:
            body: Its body.
            declared: What it says of itself, as the table has it.
        """
        shop = self

        def call(self: Any) -> object:
            # In the place where a worker calls the task: what comes out is what Celery is given.
            try:
                result = self.run()
            except BaseException as error:
                shop.raised.append(error)
                raise
            shop.raised.append(None)
            return result

        base = type("ChaosTask", (self.base,), {"abstract": True, "__call__": call})

        @self.task(base=base, name=f"{self.app.main}.task", **_options(declared))
        def task(self: Any) -> object:
            shop.runs += 1
            return body(self)

        self.sent = task

    def pause_at(self, moment: str) -> None:
        """Let happen what is to happen at this moment of the body's, if anything."""
        if moment in self.at:
            self.errands.ask(self.at.pop(moment))

    def send(self) -> None:
        """Send the task to the broker."""
        self.sent.apply_async()

    def deliver(self, message: Any) -> None:
        """Run a message's task as a worker's process does."""
        self.errands.run(Request(message, app=self.app).execute)

    def take(self) -> Any:
        """Take the next message from the broker; None if there is none."""
        with self.app.connection_for_read() as connection, connection.SimpleQueue(self.app.main) as queue:
            try:
                return queue.get_nowait()
            except queue.Empty:
                return None

    def steps(self) -> tuple[Step, ...]:
        """Return what the library says it did, in the order in which it did it."""
        found: list[Step] = []
        for event in self.events:
            if event.kind is EventKind.COMMIT_RESOLVED and event.detail == "outcome=committed":
                found.append((None, table.RESOLVED))
            elif event.kind in _DONE:
                kind = re.search(r"\bkind=(\w+)", event.detail)
                assert kind is not None
                found.append((FailureKind(kind[1]), _DONE[event.kind]))
        return tuple(found)

    def close(self) -> None:
        """Close the connections, and empty the queue."""
        super().close()
        while self.take() is not None:
            pass


def _options(declared: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "idempotent=True" in declared:
        options["idempotent"] = True
    if limit := re.search(r"soft_time_limit=(\d+)", declared):
        options["soft_time_limit"] = int(limit[1])
    if "replay=False" in declared:
        options["replay"] = False
    if "replays=0" in declared:
        options["replay"] = RetryPolicy(replays=0)
    return options


def run_to_the_end(shop: ChaosShop, heal: Callable[[], object], expected: tuple[Step, ...]) -> None:
    """Send the task, run it while everything is broken, heal, and run what it put back on the broker.

    Asserts that what came out of the first delivery, and how often the body ran, agrees with the expected steps.
    """
    shop.events.clear()
    shop.send()
    sent_at = datetime.now(timezone.utc)
    try:
        shop.deliver(shop.take())
    finally:
        returned_at = datetime.now(timezone.utc)
        heal()
    assert shop.steps() == tuple(step for step in expected if step[1] != table.TIMED_OUT), shop.raised
    kind, last = expected[-1] if expected else (None, table.UNNOTICED)
    replays = sum(done == table.REPLAYED for _, done in expected)
    replayed = replays + sum(done == table.SENT_AGAIN for _, done in expected)
    assert shop.runs == 1 + replays
    [error] = shop.raised
    if last == table.RETRIED:
        assert isinstance(error, Retry)
        original = error.__cause__ or error.__context__ or error.exc
        assert original is not None
        failure = classify(original)
        assert failure is not None
        assert failure.kind is kind
        message = shop.take()
        assert message is not None
        assert message.headers["retries"] == 1
        # Full jitter: from nothing to the policy's first bound.
        eta = datetime.fromisoformat(message.headers["eta"])
        assert sent_at <= eta <= returned_at + timedelta(seconds=RetryPolicy().backoff)
        assert message.headers.get("workerpools_replays", 0) == replayed
        assert shop.take() is None
        shop.deliver(message)
        assert shop.runs == 2 + replays
        assert shop.raised[1] is None
    elif last == table.TIMED_OUT:
        assert isinstance(error, SoftTimeLimitExceeded)
    elif last == table.RAISED:
        assert error is not None
        failure = classify(error)
        assert failure is not None
        assert failure.kind is kind
        assert any("Not run again: " in note for note in error.__notes__)
    else:
        assert error is None
    assert shop.take() is None
