"""What does a task pay for the injection and the scope, beside a plain task with globals?

Tasks run in `celery.app.trace.build_tracer`, in this process, over the thread's own CPU time. Nothing connects.

A session costs more than one that is opened and closed by hand: the attempt lends it, asks it for a transaction when
the body has returned, refuses it to whoever keeps it, and counts the engine's use.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from celery import signals

from benchmarks.measure import alternate, at_most, block, paired, quartiles
from benchmarks.result import Result
from benchmarks.servers import Servers
from benchmarks.tracer import traced, worker_like

__all__ = ["NEEDS_SERVERS", "run"]

NEEDS_SERVERS = False


def run(servers: Servers | None, *, quick: bool) -> Result:
    """Measure the microseconds a task that each way of injection adds."""
    from benchmarks.apps import touch

    # Many short blocks: what else the machine does hits two that stand beside each other alike.
    calls, rounds = (100, 5) if quick else (200, 301)

    def sample(task: Any) -> Callable[[], float]:
        call = traced(task)
        return lambda: block(call, calls)

    def with_svcs(task: Any) -> Callable[[], float]:
        # Its receivers serve every task of a process, those of the other sides, too: connected for its own alone.
        def measured() -> float:
            with _svcs_receivers():
                return block(call, calls)

        with _svcs_receivers():
            call = traced(task)
        return measured

    # What was imported is not searched for garbage again and again while tasks are measured.
    gc.collect()
    gc.freeze()
    with worker_like(touch.app):
        _svcs_disconnect()
        samples = alternate(
            {
                "plain": sample(touch.plain),
                "pooled": sample(touch.pooled),
                "global_client": sample(touch.global_client),
                "http": sample(touch.http),
                "attribute": sample(touch.attribute),
                "parameter": sample(touch.parameter),
                "session_by_hand": sample(touch.session_by_hand),
                "session": sample(touch.session),
                "svcs_client": with_svcs(touch.svcs_client),
                "svcs_session": with_svcs(touch.svcs_session),
                "injected_client": sample(touch.injected_client),
                "injected_session": sample(touch.injected_session),
            },
            rounds,
            budget=150.0,
        )

    def added(side: str, base: str, limit: float | None = None) -> Any:
        return paired(samples[side], samples[base], at_most(limit) if limit else None, difference="µs")

    return Result(
        "overhead",
        "What does a task pay for injection and scope, beside a plain task with globals?",
        {
            "plain task in the tracer": quartiles(samples["plain"], "µs"),
            "celery-svcs client, added": added("svcs_client", "global_client"),
            "dependency-injector client, added": added("injected_client", "global_client"),
            "celery-svcs session, over one by hand": added("svcs_session", "session_by_hand"),
            "dependency-injector session, over one by hand": added("injected_session", "session_by_hand"),
            "session by hand, added to a plain task": added("session_by_hand", "plain"),
            "PooledTask over a plain task": paired(samples["pooled"], samples["plain"]),
            "a client as a parameter, over self.client": added("parameter", "attribute", 3.0),
            "DatabaseTask touching self.session, over one by hand": added("session", "session_by_hand", 3.0),
            "HTTPTask touching self.http, added": added("http", "global_client", 2.0),
            "PooledTask, added": added("pooled", "plain", 2.0),
        },
        quick=quick,
        details={"calls": calls, "rounds": rounds},
    )


class _svcs_receivers:
    def __enter__(self) -> None:
        from celery_svcs import _celery

        signals.task_prerun.connect(_celery._celery_svcs_task_prerun)
        signals.task_postrun.connect(_celery._celery_svcs_task_postrun)

    def __exit__(self, *exc_info: object) -> None:
        _svcs_disconnect()


def _svcs_disconnect() -> None:
    from celery_svcs import _celery

    signals.task_prerun.disconnect(_celery._celery_svcs_task_prerun)
    signals.task_postrun.disconnect(_celery._celery_svcs_task_postrun)
