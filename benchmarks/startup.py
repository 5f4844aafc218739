"""What does a worker, and each of its children, pay at its start?

`worker_process_init` and the first HTTP task are measured in forked children, imports in fresh interpreters (CPU time),
memory in the children of real workers that have used both clients.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable

from benchmarks.measure import alternate, at_most, paired, quartiles
from benchmarks.result import Result
from benchmarks.servers import Servers
from benchmarks.workers import Worker
from tests.support.paths import environment

__all__ = ["NEEDS_SERVERS", "run"]

NEEDS_SERVERS = True

_APPS = ("ours", "by_hand", "on_task")

_IMPORT = """
import sys, time
start = time.process_time()
{first}
middle = time.process_time()
{second}
print((middle - start) * 1e3, (time.process_time() - middle) * 1e3)
"""
_NAMES = "from celery import Celery, Task, signals; Celery, Task, signals.worker_init"


def run(servers: Servers, *, quick: bool) -> Result:
    """Measure the start of a process, its first HTTP task, the import, and the memory a child takes."""
    rounds, children, forks = (2, 2, 1) if quick else (15, 4, 4)
    inits: dict[str, list[float]] = {name: [] for name in _APPS}
    variables = {
        "BENCH_DATABASE": servers.postgres.url(),
        "BENCH_HTTP": servers.upstream.url,
    }

    def first(name: str) -> Callable[[], float]:
        def measured() -> float:
            lines = _output([sys.executable, "-m", "benchmarks.probe", name, str(children)], variables)
            found = [json.loads(line) for line in lines]
            inits[name].append(statistics.median(row["init_us"] for row in found))
            return float(statistics.median(row["first_ms"] for row in found))

        return measured

    firsts = alternate({name: first(name) for name in _APPS}, rounds, budget=70.0)
    with tempfile.TemporaryDirectory() as cache:
        # Both sides find their bytecode: what a checkout's first import compiles is not measured.
        imports = functools.partial(_imports, {"PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""})
        imports(_NAMES, "import workerpools")
        used = [imports(_NAMES, "import workerpools") for _ in range(rounds)]
        bare = [imports("import celery", "import workerpools") for _ in range(rounds)]
    memory = alternate({name: _memory(servers, name) for name in _APPS}, 1 if quick else forks, budget=50.0)
    return Result(
        "startup",
        "What does a worker, and each of its children, pay at its start?",
        {
            "worker_process_init, hand-written": quartiles(inits["by_hand"], "µs"),
            "first HTTP task, ours": quartiles(firsts["ours"], "ms"),
            "first HTTP task, client opened in worker_process_init": quartiles(firsts["by_hand"], "ms"),
            "first HTTP task, client with a TLS context of its own": quartiles(firsts["on_task"], "ms"),
            "import celery, alone": quartiles([pair[0] for pair in bare], "ms"),
            "from celery import Celery, Task": quartiles([pair[0] for pair in used], "ms"),
            "import workerpools after `import celery`, which loads nothing": quartiles(
                [pair[1] for pair in bare], "ms"
            ),
            "memory a child, ours over hand-written": paired(memory["ours"], memory["by_hand"]),
            "memory a child, ours": quartiles(memory["ours"], "MiB"),
            "import workerpools after `from celery import Celery, Task`": quartiles(
                [pair[1] for pair in used], "ms", at_most(15.0)
            ),
            "worker_process_init, ours": quartiles(inits["ours"], "µs", at_most(1000.0)),
            "first HTTP task, ours over a TLS context of its own": paired(
                firsts["ours"], firsts["on_task"], at_most(0.2)
            ),
        },
        quick=quick,
        details={"rounds": rounds, "children_a_round": children},
    )


def _imports(variables: dict[str, str], first: str, second: str) -> tuple[float, float]:
    script = _IMPORT.format(first=first, second=second)
    before, after = _output([sys.executable, "-c", script], variables)[0].split()
    return float(before), float(after)


def _output(command: list[str], variables: dict[str, str]) -> list[str]:
    done = subprocess.run(command, env=environment(variables), capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} failed:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()


def _memory(servers: Servers, name: str) -> Callable[[], float]:
    def measured() -> float:
        with Worker(servers, name) as worker:
            worker.ready()
            for task in ("read", "get"):
                worker.burst(task, 60)
            return statistics.median(worker.memory())

    return measured
