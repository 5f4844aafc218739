"""Workers that answer Flower with whatever a test wants: no tasks, but a real broker between the two."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from celery import Celery

from workerpools._stats.metrics import FIRST, WIDTH, definition
from workerpools._stats.snapshot import Alert, ProcessStats, ResourceStats, WorkerStats


def resource(name: str, kind: str = "database", **numbers: float) -> ResourceStats:
    """Return a resource with these numbers; of a number with a label the first value, of a histogram the longest."""
    row = [0.0] * WIDTH
    for number, value in numbers.items():
        found = definition(number)
        # The longest one is the last of a histogram's numbers.
        row[FIRST[number] + (found.width - 1 if found.type.value == "histogram" else 0)] = value
    row[FIRST["idle"]] = max(0.0, row[FIRST["open"]] - row[FIRST["in_use"]])
    return ResourceStats(name, kind, tuple(row))


def process(pid: int, index: int | None, *resources: ResourceStats, **more: Any) -> ProcessStats:
    """Return a process whose last task ended two seconds ago."""
    now = time.time()
    given: dict[str, Any] = {
        "tokens": 500,
        "capacity": 500,
        "started": now - 600,
        "published": now - 2,
        "last_task": now - 2,
        **more,
    }
    return ProcessStats(pid=pid, index=index, resources=resources, **given)


def worker_stats(*processes: ProcessStats, alerts: Sequence[Alert] = (), **more: Any) -> WorkerStats:
    """Return the snapshot of a prefork worker."""
    given = {"pid": 4000, "execution_pool": "prefork", **more}
    return WorkerStats(taken=time.time(), processes=processes, alerts=tuple(alerts), **given)


def told(*snapshots: WorkerStats) -> dict[str, Any]:
    """Return what a worker says of its connection pools."""
    return {
        "resources": {each.name: "open 1" for stats in snapshots for each in stats.totals()},
        "processes": {},
        "unseen": 0,
        "snapshots": [stats.to_dict() for stats in snapshots],
    }


class FakeWorkers:
    """Nodes at a broker. Entering the context starts them, leaving it ends them.

    Args:
        broker_url: The broker.
        workers: What each says of its connection pools, by its name, or a function that returns it; None without a
            WorkerPools. May be changed at any time.
    """

    def __init__(self, broker_url: str, workers: Mapping[str, Any]) -> None:
        self.told = dict(workers)
        #: How often each was asked for its statistics.
        self.asked = dict.fromkeys(workers, 0)
        #: Those that neither answer nor send heartbeats.
        self.dead: set[str] = set()
        #: Those that send heartbeats, and answer when they are taken out of here.
        self.busy: set[str] = set()
        self._app = Celery("fake", broker=broker_url, set_as_current=False)
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> FakeWorkers:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join(20)
        self._app.close()

    def _run(self) -> None:
        with self._app.connection_for_read() as connection, contextlib.ExitStack() as opened:
            mailbox = self._app.control.mailbox(connection)
            # Of two queues of one channel, only one gets what is sent to both.
            nodes = [opened.enter_context(_Node(self, mailbox, name, connection.channel())) for name in self.told]
            events = opened.enter_context(self._app.events.default_dispatcher(hostname="x"))
            beaten = 0.0
            self._ready.set()
            while not self._stop.is_set():
                if time.monotonic() - beaten > 1.0:
                    beaten = time.monotonic()
                    for name in set(self.told) - self.dead:
                        self._send(events, name, "worker-heartbeat")
                with contextlib.suppress(TimeoutError):
                    connection.drain_events(timeout=0.1)
                for node in nodes:
                    node.catch_up()

    def _send(self, events: Any, name: str, kind: str) -> None:
        events.hostname = name
        events.send(kind, freq=2.0, active=0, processed=7, loadavg=(0.1, 0.2, 0.3))


_LISTS = ("active", "active_queues", "registered", "reserved", "revoked", "scheduled")


class _Node(contextlib.AbstractContextManager["_Node"]):
    def __init__(self, workers: FakeWorkers, mailbox: Any, name: str, channel: Any) -> None:
        self._workers, self._name = workers, name
        self._late: list[tuple[Any, Any]] = []
        handlers = {
            "stats": self._stats,
            "conf": lambda _, **__: {"timezone": "UTC"},
            **dict.fromkeys(_LISTS, lambda _, **__: []),
            **dict.fromkeys(("enable_events", "heartbeat"), lambda _, **__: None),
        }
        self._node = mailbox.Node(name, state=None, channel=channel, handlers=handlers)
        self._consumer = self._node.listen(callback=self._hear)

    def __exit__(self, *exc_info: object) -> None:
        self._consumer.cancel()

    def _hear(self, body: Any, message: Any) -> None:
        if self._name in self._workers.busy:
            self._late.append((body, message))
        elif self._name not in self._workers.dead:
            self._node.handle_message(body, message)

    def catch_up(self) -> None:
        """Answer what was asked meanwhile, as a worker does whose main process was busy."""
        if self._name not in self._workers.busy:
            while self._late:
                self._node.handle_message(*self._late.pop(0))

    def _stats(self, _: Any, **__: Any) -> dict[str, Any]:
        self._workers.asked[self._name] += 1
        stats = {
            "total": {"shop.visit": 7},
            "pid": 4000,
            "pool": {"max-concurrency": 2, "processes": [4001, 4002]},
            "broker": {"hostname": "127.0.0.1"},
            "prefetch_count": 8,
            "rusage": {"utime": 1.0},
            "uptime": 77,
        }
        pools = self._workers.told[self._name]
        pools = pools() if callable(pools) else pools
        return stats if pools is None else {**stats, "workerpools": pools}
