"""An application whose tasks use a session, as a worker runs it."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import requests
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools.requests import RequestsSession

app = Celery("asked", broker=os.environ["ASKED_BROKER"], backend=os.environ["ASKED_BROKER"])
pools = WorkerPools(app)


class AskingTask(PooledTask):
    """A base with a session."""

    # However slow the machine is, idle connections are used again: what finds them dead is the task.
    api = pools.add(
        RequestsSession(os.environ["ASKED_API"], trust_env=False, max_idle=None, pool_maxsize=4, acquire_timeout=5.0)
    )
    # Tasks fail at once where nothing but the replay in the process is looked at.
    replay = RetryPolicy(max_retries=0)


@app.task(base=AskingTask, bind=True, name="asked.read")
def read(self: AskingTask, token: str) -> dict[str, Any]:
    """Ask for an answer of one's own."""
    return {"pid": os.getpid(), "right": self.api.get(f"/echo/{token}?delay=0.005").text == token}


@app.task(base=AskingTask, bind=True, name="asked.order")
def order(self: AskingTask, key: str | None) -> int:
    """Place an order, over a connection that is kept."""
    self.api.get("/echo/warm")
    self.api.post("/orders", headers={} if key is None else {"Idempotency-Key": key})
    return os.getpid()


@app.task(
    base=AskingTask, bind=True, name="asked.patient", replay=RetryPolicy(max_retries=50, backoff=0.1, backoff_max=0.1)
)
def patient(self: AskingTask) -> int:
    """Go back to the broker while the server is away."""
    self.api.post("/orders")
    return os.getpid()


@app.task(base=AskingTask, bind=True, name="asked.struck")
def struck(self: AskingTask, number: int) -> list[int]:
    """Be struck by a time limit again and again, at random moments; count right answers, wrong ones and strikes."""
    import signal

    def strike(*_: object) -> None:
        raise SoftTimeLimitExceeded

    drawn, found = random.Random(number), [0, 0, 0]
    before = signal.signal(signal.SIGALRM, strike)
    until = time.monotonic() + 3.0
    try:
        while time.monotonic() < until:
            try:
                signal.setitimer(signal.ITIMER_REAL, drawn.uniform(0.0001, 0.03))
                answer = None
                try:
                    answer = nested.run(str(number))
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                found[answer != str(number)] += 1
            except SoftTimeLimitExceeded:
                found[2] += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return found


@app.task(base=AskingTask, bind=True, name="asked.nested")
def nested(self: AskingTask, token: str) -> str:
    """A task that another one calls, with an attempt of its own."""
    api: requests.Session = self.api
    return api.get(f"/echo/{token}?delay=0.001").text
