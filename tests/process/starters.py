"""A program that uses its clients, starts processes that use them, too, and uses its own again; one for each starter.

python -m tests.process.starters fork
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import billiard

from tests.support.recorder import entries, record
from tests.worker import clients

CHILDREN = 2
FIRST, LAST = 1000, 9000


def use_all(first: int) -> int:
    """Use every client three times, and return this process's id."""
    for number in range(first, first + 3):
        for client in clients.URLS:
            if client.startswith("async"):
                clients.pools.run(clients.use_async(None, client, number, "GET"))
            else:
                clients.use(None, client, number, "GET")
    return os.getpid()


def child(number: int) -> int:
    """What each process does: use the clients while the others do, the parent included."""
    record("child", number)
    everybody()
    use_all(FIRST * (number + 1))
    record("used", number)
    return os.getpid()


def everybody() -> None:
    """Wait until all processes are up."""
    until = time.monotonic() + 60.0
    while len(entries(Path(os.environ["SHOP_RECORD"]), "child")) < CHILDREN:
        assert time.monotonic() < until
        time.sleep(0.01)


def of_context(context: Any) -> None:
    """``Process`` of multiprocessing's contexts, and of billiard's."""
    processes = [context.Process(target=child, args=(number,)) for number in range(CHILDREN)]
    for process in processes:
        process.start()
    everybody()
    use_all(LAST)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0, process


def of_executor(method: str) -> None:
    """``ProcessPoolExecutor``."""
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(CHILDREN, mp_context=context) as executor:
        futures = [executor.submit(child, number) for number in range(CHILDREN)]
        everybody()
        use_all(LAST)
        assert len({future.result(60) for future in futures}) == CHILDREN


def of_fork() -> None:
    """``os.fork()``."""
    pids = []
    for number in range(CHILDREN):
        pid = os.fork()
        if pid == 0:
            child(number)
            # As a program ends.
            sys.exit(0)
        pids.append(pid)
    everybody()
    use_all(LAST)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * CHILDREN


def of_programs() -> None:
    """Programs of their own."""
    command = "from tests.process import starters; starters.child({})"
    started = [subprocess.Popen([sys.executable, "-c", command.format(number)]) for number in range(CHILDREN)]
    everybody()
    use_all(LAST)
    assert [each.wait(60) for each in started] == [0] * CHILDREN


def of_notebook() -> None:
    """A main thread that lives long, with a running loop, and calls tasks in their own process."""
    clients.app.conf.task_always_eager = clients.app.conf.task_eager_propagates = True

    async def cell(number: int) -> None:
        for client in clients.URLS:
            task = clients.app.tasks[f"shop.{client}"]
            for method in ("GET", "POST"):
                result = task.delay(number, method)
                assert result.get() == {"pid": os.getpid(), "effects": result.get()["effects"]}
                assert len(result.get()["effects"]) == (method == "POST")

    loop = asyncio.new_event_loop()
    for number in range(3):
        loop.run_until_complete(cell(LAST + 10 + number))
    use_all(LAST)
    loop.close()


def of_method(method: str) -> None:
    of_context(multiprocessing.get_context(method))


STARTERS: dict[str, Callable[[], None]] = {
    **{method: partial(of_method, method) for method in ("fork", "spawn", "forkserver")},
    **{f"executor {method}": partial(of_executor, method) for method in ("fork", "spawn", "forkserver")},
    "billiard fork": lambda: of_context(billiard.get_context("fork")),
    "billiard spawn": lambda: of_context(billiard.get_context("spawn")),
    "os.fork": of_fork,
    "programs": of_programs,
    "notebook": of_notebook,
}

if __name__ == "__main__":
    use_all(1)
    for starter in sys.argv[1:]:
        STARTERS[starter]()
        use_all(LAST + 5)
        Path(os.environ["SHOP_RECORD"]).rename(f"{os.environ['SHOP_RECORD']}.{starter}")
