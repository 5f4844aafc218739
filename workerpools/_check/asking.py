"""What the connection budget is made from: the workers, planned or running, and what their servers say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from workerpools._celery import apps
from workerpools._celery.cli.asking import Failed, ask
from workerpools._check.budget import UNKNOWN, Row, Workers, budget, findings
from workerpools._check.findings import Finding
from workerpools._pools.limits import Limit
from workerpools._pools.shared import ExecutionPool
from workerpools._process.bounded import run_bounded
from workerpools._stats.snapshot import WorkerStats, resources
from workerpools.errors import ConfigurationError

__all__ = ["POOLS", "TIMEOUT", "budget_of", "declared", "findings_of", "places", "planned", "running", "workers_of"]

#: How long a server may take to tell its limits, in seconds, with the time to connect.
PATIENCE = 20.0

#: How long to wait for the replies of workers, in seconds.
TIMEOUT = 1.0

#: The execution pools whose processes are known.
POOLS = ("prefork", "solo", "threads", "gevent", "eventlet")


def budget_of(app: Any, workers: Sequence[Workers]) -> list[Row]:
    """Return the budget of workers of ``app``; asks the servers, over one connection per resource.

    Args:
        app: The app, with its tasks loaded.
        workers: The workers.
    """
    known = {each.name: each for each in declared(app)}
    limits: dict[str, Sequence[Limit]] = {}
    for name in dict.fromkeys(name for each in workers for name in each.ceilings):
        if name in known:
            limits[name] = _limits(known[name])
        else:
            limits[name] = [_unknown(name, f"this app declares no resource {name!r}, which a worker has")]

    def ceiling(name: str, kind: str, concurrency: int) -> int | None:
        return known[name].capacity(ExecutionPool(kind, concurrency)) if name in known else None

    return budget(workers, limits, ceiling)


def findings_of(app: Any, workers: int | None, concurrency: int | None) -> list[Finding]:
    """Return what is wrong with the budget of planned workers; without a number, with that of the workers that run.

    Args:
        app: The app, with its tasks loaded.
        workers: How many.
        concurrency: The most tasks that each runs at a time.

    Raises:
        ConfigurationError: See :func:`planned`.
    """
    if workers is None and concurrency is None:
        try:
            found = running(app, TIMEOUT)
        except Failed as nobody:
            return [UNKNOWN.at("workers", f"{nobody.message}; or name them: --workers and --concurrency")]
    else:
        found = planned(app, workers, concurrency)
    return findings(budget_of(app, found), places(app))


def planned(app: Any, workers: int | None, concurrency: int | None, kind: str | None = None) -> list[Workers]:
    """Return workers that are alike, with the resources that ``app`` declares.

    Args:
        app: The app, with its tasks loaded.
        workers: How many; None for one.
        concurrency: The most tasks that each runs at a time; None for the app's setting.
        kind: Their execution pool; None for the app's setting.

    Raises:
        ConfigurationError: A number is neither given nor in the app's settings, or the execution pool is none that is
            known.
    """
    kind = kind or _kind(app.conf.worker_pool)
    if kind not in POOLS:
        raise ConfigurationError(f"the budget of the execution pool {app.conf.worker_pool!r} is not known; give one")
    concurrency = concurrency or app.conf.worker_concurrency or (1 if kind == "solo" else None)
    if concurrency is None:
        raise ConfigurationError(
            "give the concurrency: Celery's default is the number of processors where the worker runs, which need not "
            "be this machine"
        )
    workers = workers or 1
    each = 1 if kind in ("prefork", "solo") else concurrency
    found = {
        resource.name: most
        for resource in declared(app)
        if (most := resource.capacity(ExecutionPool(kind, each))) is not None
    }
    return [Workers(workers, kind, 1 if kind == "solo" else concurrency, found)]


def _kind(setting: Any) -> str:
    # A name, "module:class", or a class.
    name = getattr(setting, "__module__", str(setting).partition(":")[0]).rpartition(".")[2]
    return {"processes": "prefork", "thread": "threads"}.get(name, name)


def running(app: Any, timeout: float, destination: Sequence[str] | None = None) -> list[Workers]:
    """Return the workers that run; asks them by way of the broker.

    Args:
        app: The app.
        timeout: How long to wait for replies, in seconds.
        destination: The workers' names; None for all workers.

    Raises:
        Unavailable: No worker replied, or a named one did not, or the broker cannot be reached.
        Failed: A worker refused the command.
    """
    answers = ask(app, "pools", timeout=timeout, destination=destination)
    answers.check()
    return workers_of(answers.snapshots())


def workers_of(snapshots: Mapping[str, Sequence[WorkerStats]]) -> list[Workers]:
    """Return the workers that sent these snapshots.

    Args:
        snapshots: What each worker sent, by its name.
    """
    return [_worker(stats) for _, stats in sorted(snapshots.items()) if stats]


def _worker(stats: Sequence[WorkerStats]) -> Workers:
    """Return a worker; each WorkerPools of its app has sent its statistics."""
    ceilings = {name: most for each in stats for name, most in each.ceilings}
    opened = {each.name: each.open for each in resources(stats)}
    return Workers(1, stats[0].execution_pool, stats[0].concurrency, ceilings, opened)


def places(app: Any) -> dict[str, str]:
    """Return where each resource is declared, as findings name it."""
    return {each.name: each.where for each in declared(app)}


def declared(app: Any) -> Iterator[Any]:
    """Yield the resources of all WorkerPools of an app."""
    for pools in apps.all_of(app):
        yield from pools.resources


def _limits(resource: Any) -> Sequence[Limit]:
    found: list[Limit] = []
    why = [f"the server did not tell within {PATIENCE:.0f} s"]

    def ask_it() -> None:
        was_open = resource.is_open
        try:
            found.extend(resource.adapter.limits(resource.get(), resource.name))
            why[0] = "its adapter does not tell"
        except Exception as error:
            # Its text may have secrets.
            why[0] = f"asking for it raised {type(error).__name__}"
        finally:
            if not was_open:
                resource.close(1.0)

    ended = run_bounded(ask_it, PATIENCE)
    return list(found) if ended and found else [_unknown(resource.adapter.describe(), why[0], resource.name)]


def _unknown(server: str, why: str, key: str = "") -> Limit:
    return Limit(server, "connections", f"{server} {key}", unknown=why)
