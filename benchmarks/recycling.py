"""What is left of asynchronous clients when the worker's children are recycled all the time?

`worker_max_tasks_per_child` ends a child after its share of the tasks, so that 10,000 async tasks run in 50 children,
two at a time. Each opens a client on an event loop of its own, and closes both. Reuse is the share of the requests that
needed no new connection, counted by the server. Errors are lines of the log about a loop or a connection that was
closed too early or not at all; Python's resource warnings are on. Nothing here is a time, so that the machine's load
does not matter.
"""

from __future__ import annotations

import re

from benchmarks.measure import at_least, at_most, quartiles
from benchmarks.result import Result
from benchmarks.servers import Servers
from benchmarks.workers import Worker

__all__ = ["NEEDS_SERVERS", "run"]

NEEDS_SERVERS = True

_ERRORS = re.compile(
    r"loop is closed|different (event )?loop|never (retrieved|awaited)|unclosed <(?!_io)|was destroyed"
)


def run(servers: Servers, *, quick: bool) -> Result:
    """Run async tasks in children that are recycled; count what they leave behind."""
    tasks, share = (200, 20) if quick else (10_000, 200)
    upstream = servers.upstream
    open_before, accepted = upstream.open_connections(), upstream.accepted
    environment = {"BENCH_MAX_TASKS": str(share), "PYTHONWARNINGS": "default"}
    with Worker(servers, "clients_ours", environment=environment) as worker:
        worker.ready()
        ended = worker.burst("fetch", tasks, timeout=1800.0)
        code = worker.process.stop(60.0)
        log = worker.process.log()
    left, opened = upstream.open_connections() - open_before, upstream.accepted - accepted
    failed = sum(not each.success for each in ended)
    return Result(
        "recycling",
        "What is left of asynchronous clients when children are recycled all the time?",
        {
            "failed tasks": quartiles([failed], "tasks", at_most(0.0)),
            "errors of a loop in the log": quartiles([len(_ERRORS.findall(log))], "lines", at_most(0.0)),
            "sockets left open after the stop": quartiles([left], "sockets", at_most(0.0)),
            "requests over a kept connection": quartiles(
                [1 - opened / tasks], "of all", at_least(0.9 if quick else 0.99)
            ),
        },
        quick=quick,
        details={
            "tasks": tasks,
            "tasks_per_child": share,
            "connections_opened": opened,
            "exit_code": code,
        },
    )
