"""Real prefork workers, one a way of keeping connections, all up at a time and each with a queue of its own."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from celery import Celery

from benchmarks.apps.common import RECORD
from benchmarks.servers import Servers
from tests.support.worker import WorkerProcess

__all__ = ["Ended", "Worker", "proportional_memory", "rate_of"]


class Ended(NamedTuple):
    """One task that ended; times in seconds of `time.monotonic`.

    Attributes:
        number: What it was given.
        began: When its body began.
        ended: When its outcome was decided, its transaction included.
        success: 1 for success, 0 for failure.
    """

    number: float
    began: float
    ended: float
    success: float


class Worker:
    """A worker of one application; a context manager.

    Args:
        servers: What it talks to.
        app: The module's name in `benchmarks.apps`.
        concurrency: Its children.
        environment: More variables for its process, over those that name the servers.
    """

    def __init__(
        self, servers: Servers, app: str, *, concurrency: int = 2, environment: Mapping[str, str] | None = None
    ) -> None:
        self.app = app
        self._redis = servers.redis
        self._queue = f"{app}-{uuid.uuid4().hex[:8]}"
        self._folder = tempfile.TemporaryDirectory(prefix="workerpools-bench-")
        self._record = Path(self._folder.name) / "ended"
        self._record.touch()
        self._read = 0
        self._producer = Celery("producer", broker=servers.broker, set_as_current=False)
        self.process = WorkerProcess(
            f"benchmarks.apps.{app}:app",
            concurrency=concurrency,
            env={
                "BENCH_BROKER": servers.broker,
                "BENCH_QUEUE": self._queue,
                "BENCH_RECORD": str(self._record),
                "BENCH_DATABASE": servers.postgres.url(),
                "BENCH_HTTP": servers.upstream.url,
                "BENCH_CACHE": servers.valkey.url(1),
                **(environment or {}),
            },
            args=["--without-heartbeat", "-Q", self._queue],
        )

    def __enter__(self) -> Worker:
        self.process.start()
        return self

    def ready(self) -> Worker:
        """Wait until it takes tasks: entering the context only starts it, so that several start at a time."""
        self.process.wait_ready(60.0)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.close()
        self._producer.close()
        self._folder.cleanup()

    def send(self, task: str, *arguments: float) -> None:
        """Publish one task."""
        self._producer.send_task(task, arguments, queue=self._queue)

    def burst(self, task: str, count: int, *arguments: float, timeout: float = 120.0) -> list[Ended]:
        """Have the worker run ``count`` tasks, all there before the first begins; return when all ended.

        Args:
            task: The task's name.
            count: How many.
            arguments: What each is given after its number.
            timeout: How long they may take, in seconds.
        """
        staging = f"{self._queue}-staging"
        with self._producer.producer_pool.acquire(block=True) as producer:
            for number in range(count):
                self._producer.send_task(task, (float(number), *arguments), queue=staging, producer=producer)
        # A queue is a list under its name: published under another one, the worker gets all at once.
        self._redis.rename(staging, self._queue)
        return self.wait(count, timeout)

    def wait(self, count: int, timeout: float = 120.0) -> list[Ended]:
        """Wait until ``count`` more tasks than were told of before have ended, and return them."""
        wanted = self._read + count * RECORD.size
        deadline = time.monotonic() + timeout
        while self._record.stat().st_size < wanted:
            if time.monotonic() > deadline:
                done = (self._record.stat().st_size - self._read) // RECORD.size
                raise TimeoutError(f"{self.app}: {done} of {count} tasks ended\n{self.process.log()[-2000:]}")
            time.sleep(0.01)
        with self._record.open("rb") as file:
            file.seek(self._read)
            found = file.read(count * RECORD.size)
        self._read += len(found)
        return [Ended(*row) for row in RECORD.iter_unpack(found)]

    def rate(self, task: str, count: int) -> float:
        """Return the tasks a second of a burst, from the first beginning to the last end."""
        ended = self.burst(task, count)
        failed = sum(not row.success for row in ended)
        if failed:
            raise RuntimeError(f"{self.app}: {failed} of {count} {task} failed\n{self.process.log()[-2000:]}")
        return len(ended) / (max(row.ended for row in ended) - min(row.began for row in ended))

    def memory(self) -> list[float]:
        """Return each child's proportional share of memory, in MiB."""
        return [proportional_memory(pid) for pid in self.process.children()]


def rate_of(worker: Worker, task: str, count: int) -> Callable[[], float]:
    """Return a function that has ``worker`` run a burst, and returns its tasks a second."""
    return lambda: worker.rate(task, count)


def proportional_memory(pid: int) -> float:
    """Return a process's PSS in MiB: its own pages, and its part of those that it shares (Linux only)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
