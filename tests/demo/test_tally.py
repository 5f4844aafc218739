"""Whose counts the demo's counts are."""

from __future__ import annotations

import os
import socket

from celery import Celery

from demo_tasks.settings import Settings
from demo_tasks.tally import Tally
from workerpools import WorkerPools
from workerpools.events import Event, EventKind


def test_processes_with_the_same_id_are_told_apart(broker_url: str) -> None:
    """In a container that is started again, children have the ids of earlier ones; each has a line of its own."""
    settings = Settings(broker_url, "", "", "tally-test-")
    for opened in (2, 1):
        generation = Tally(settings)
        with WorkerPools(Celery("tally", set_as_current=False)) as pools:
            generation.watch(pools)
            for _ in range(opened):
                generation._noticed(Event(EventKind.CONNECTION_OPENED, "db", pid=os.getpid()))
    children = generation.read()
    assert [child.opened["db"] for _, child in sorted(children.items())] == [2, 1]
    assert {(name.split("/")[0], name.split("/")[-1]) for name in children} == {
        (socket.gethostname(), str(os.getpid()))
    }
