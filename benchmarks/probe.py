"""One worker's start without a broker: `python -m benchmarks.probe APP CHILDREN` prints a JSON line a child.

The parent imports the application and tells it that a worker starts; each child, one after the other, is forked, told
that its process starts, and runs the HTTP task once.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

from celery import signals
from celery.concurrency.prefork import TaskPool

from benchmarks.tracer import traced, worker_like


class _Worker:
    """What `worker_init` shows of a worker."""

    pool_cls = TaskPool
    concurrency = max_concurrency = 2
    time_limit = soft_time_limit = None

    def __init__(self, app: object) -> None:
        self.app = app


def main() -> None:
    """Fork the children, and print what each took: ``init_us`` in microseconds, ``first_ms`` in milliseconds."""
    name, children = sys.argv[1], int(sys.argv[2])
    app = importlib.import_module(f"benchmarks.apps.{name}").app
    with worker_like(app):
        signals.worker_init.send(sender=_Worker(app))
        # As in a worker, whose parent has both long before it forks.
        app.finalize()
        app.backend  # noqa: B018
        for _ in range(children):
            if os.fork() == 0:
                print(json.dumps(_child(app.tasks["get"])), flush=True)
                os._exit(0)
            os.wait()


def _child(task: object) -> dict[str, float]:
    start = time.perf_counter()
    signals.worker_process_init.send(sender=None)
    initialized = time.perf_counter()
    # It runs the task once.
    traced(task)
    return {"init_us": (initialized - start) * 1e6, "first_ms": (time.perf_counter() - initialized) * 1e3}


if __name__ == "__main__":
    main()
