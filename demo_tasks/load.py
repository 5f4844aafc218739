"""Submits the demo's tasks and collects their results, a bounded number at a time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any

from celery.result import denied_join_result

from demo_tasks import tasks as _tasks
from demo_tasks.app import app
from demo_tasks.summary import Summary, counted_since
from demo_tasks.workload import rows

__all__ = ["Load", "Stalled"]

# How many tasks are on their way at a time. Enough that no child is ever without one, and few enough that the load goes
# on while the results of the first tasks come in.
WINDOW = 400

# How often results are looked for, in seconds.
INTERVAL = 0.05

_ARTICLES = ("teapot", "kettle", "cup", "saucer", "strainer")


class Stalled(RuntimeError):
    """No task has ended for too long; the message says for how long."""


class Load:
    """A number of tasks on their way through the worker.

    Args:
        run: What the ids of this run's orders begin with.
        tasks: How many tasks to submit.
        patience: How long no task may end, in seconds, before that is taken for a failure.
    """

    def __init__(self, run: str, tasks: int, patience: float = 60.0) -> None:
        self.tasks = tasks
        self.succeeded = 0
        self.failed = 0
        #: What became of the first few tasks that failed, one line each.
        self.failures: list[str] = []
        self._calls = itertools.islice(_calls(run), tasks)
        self._names: dict[str, str] = {}
        self._patience = patience
        self._before = _tasks.tally.read()
        self._started = self._last = time.monotonic()

    @property
    def done(self) -> int:
        """How many tasks have ended."""
        return self.succeeded + self.failed

    @property
    def finished(self) -> bool:
        """Whether all of them have."""
        return self.done >= self.tasks

    @property
    def seconds(self) -> float:
        """How long it took from the start to the last task that ended, in seconds."""
        return self._last - self._started

    def step(self) -> int:
        """Submit what there is room for, collect what has ended, wait a moment; return how many have ended.

        Raises:
            Stalled: No task has ended for ``patience`` seconds.
        """
        self._submit()
        ended = 0
        # With a set of its own: get_many takes out what it has found.
        for task_id, result in app.backend.get_many(set(self._names), interval=INTERVAL, max_iterations=1):
            self._ended(self._names.pop(task_id), result)
            ended += 1
        if ended:
            self._last = time.monotonic()
        elif time.monotonic() - self._last > self._patience:
            raise Stalled(
                f"No task has ended for {self._patience:.0f} s; {self.done} of {self.tasks} have ended before. "
                "Is a worker running?"
            )
        return ended

    def summary(self, counted_rows: Mapping[str, int]) -> Summary:
        """Return what the load came to.

        Args:
            counted_rows: How many rows of this run each table has.
        """
        return Summary(
            tasks=self.tasks,
            succeeded=self.succeeded,
            failed=self.failed,
            failures=self.failures,
            seconds=self.seconds,
            children=counted_since(self._before, _tasks.tally.read()),
            rows=counted_rows,
            rows_expected=rows(self.tasks),
        )

    def _submit(self) -> None:
        # Results are polled. Without this Celery would also subscribe to a channel for each task, and nobody would
        # read what arrives there.
        with denied_join_result():
            for name, signature in itertools.islice(self._calls, max(0, WINDOW - len(self._names))):
                self._names[signature.apply_async().id] = name

    def _ended(self, name: str, result: dict[str, Any]) -> None:
        if result["status"] == "SUCCESS":
            self.succeeded += 1
            return
        self.failed += 1
        if len(self.failures) < 5:
            error = result["result"]
            first_line = str(error).partition("\n")[0]
            self.failures.append(f"{name}: {result['status']}: {type(error).__name__}: {first_line}")


def _calls(run: str) -> Iterator[tuple[str, Any]]:
    # To a type checker that does not know Celery's decorator, tasks are plain functions.
    shop: Any = _tasks
    # In the order of workload.USES.
    for number in itertools.count(1):
        order_id = f"{run}-{number:06d}"
        article = _ARTICLES[number % len(_ARTICLES)]
        yield "fetch_price", shop.fetch_price.s(article)
        yield "place_order", shop.place_order.s(order_id, article, 1 + number % 3)
        yield "take_payment", shop.take_payment.s(order_id, 100 + number)
        yield "sync_shipment", shop.sync_shipment.s(order_id)
        yield "check_address", shop.check_address.s(order_id)
        yield "track_parcel", shop.track_parcel.s(order_id)
        yield "reserve_article", shop.reserve_article.s(order_id, article)
        yield "compare_suppliers", shop.compare_suppliers.s(article)
