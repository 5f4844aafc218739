"""Runs tasks of the benchmarks' applications in this process, in the tracer that a worker's child runs them in."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from celery.app.trace import build_tracer, reset_worker_optimizations, setup_worker_optimizations

__all__ = ["load", "traced", "worker_like"]

_numbers = itertools.count(1)


def load(name: str, environment: Mapping[str, str]) -> ModuleType:
    """Import `benchmarks.apps.<name>` once more, under a name of its own, and open its clients.

    Args:
        name: The module's name in `benchmarks.apps`.
        environment: What it finds in ``os.environ`` meanwhile.
    """
    kept = dict(os.environ)
    os.environ.update(environment)
    try:
        common = _fresh("common", "benchmarks.apps.common")
        module = _fresh(name, f"benchmarks.apps._{name}_{next(_numbers)}")
        # Within: what it opens may look at the environment, too.
        open_clients: Callable[[], object] | None = getattr(module, "open_clients", None)
        if open_clients is not None:
            open_clients()
    finally:
        os.environ.clear()
        os.environ.update(kept)
    assert module.common is common
    return module


def _fresh(name: str, as_name: str) -> ModuleType:
    path = Path(__file__).parent / "apps" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(as_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[as_name] = module
    if name == "common":
        # `from benchmarks.apps import common` looks at the package before it looks at sys.modules.
        setattr(importlib.import_module("benchmarks.apps"), name, module)
    spec.loader.exec_module(module)
    return module


@contextmanager
def worker_like(app: Any) -> Iterator[None]:
    """Have Celery protect its task stack as in a worker's child, until the block ends."""
    setup_worker_optimizations(app)
    try:
        yield
    finally:
        reset_worker_optimizations(app)


def traced(task: Any, *, soft_limit: float | None = None) -> Callable[[], None]:
    """Return a function that runs ``task`` once, as a worker's child does.

    Args:
        task: A task that takes a number.
        soft_limit: The message's own soft time limit, in seconds; the tracer does not enforce it.
    """
    app = task.app
    app.finalize()
    trace = build_tracer(task.name, task, app=app)
    number = str(uuid.uuid4())
    args: tuple[float, ...] = (7.0,)
    kwargs: dict[str, object] = {}
    request = {
        "lang": "py",
        "task": task.name,
        "id": number,
        "root_id": number,
        "parent_id": None,
        "group": None,
        "retries": 0,
        "timelimit": [None, soft_limit],
        "expires": None,
        "eta": None,
        "origin": "benchmark",
        "ignore_result": True,
        "headers": {},
        "delivery_info": {"exchange": "", "routing_key": "q", "priority": 0, "redelivered": False},
        "hostname": "benchmark",
        "is_eager": False,
        "args": args,
        "kwargs": kwargs,
        "callbacks": None,
        "errbacks": None,
        "chain": None,
        "chord": None,
    }

    def run() -> None:
        outcome = trace(number, args, kwargs, request)
        if outcome[1] is not None:
            raise RuntimeError(f"{task.name} failed: {outcome[1].retval!r}")

    # What fails is to fail here, and not to be measured.
    run()
    return run
