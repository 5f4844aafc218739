"""No secret of a corpus of fifty URLs and options is shown anywhere, whatever a real worker's tasks do with them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import redis

from demo_tasks.servers import Workspace
from tests.support.flower import FlowerProcess
from tests.support.paths import environment
from tests.support.program import run
from tests.support.stand import PATIENCE, Stand, wait_until
from tests.support.worker import WorkerProcess

pytestmark = [pytest.mark.worker, pytest.mark.timeout(240)]

USER = "someone:a-password"

#: An app whose conf alone has the secret, and that creates no WorkerPools before it is reported on.
PLAIN = """\
from celery import Celery
from workerpools import HTTPTask

app = Celery("plain", broker="memory://")
app.conf.workerpools_http_base_url = "https://me:s3cr3t50@api.example.com/hooks/t4il50"

@app.task(base=HTTPTask)
def task(): pass
"""


def test_corpus(stand: Stand, tmp_path: Path) -> None:
    """Logs at DEBUG with spans, metrics and events in them, results, `celery report`, remote control, Flower."""
    place = f"{stand.database.host}:{stand.database.port}"
    own = {"CORPUS_DATABASE": place, "WORKERPOOLS_DATABASE_URL": "", "WORKERPOOLS_HTTP_BASE_URL": ""}
    env = {name: value for name, value in stand.environment(own).items() if not name.startswith("WORKERPOOLS_")}
    said: dict[str, str] = {}
    worker = WorkerProcess(
        "tests.worker.corpus:app", env={**env, "CORPUS_WORKER": "1"}, concurrency=2, events=True, loglevel="DEBUG"
    )
    with worker, Workspace() as workspace:
        with FlowerProcess(workspace, stand.broker_url, arguments=[f"--basic_auth={USER}"]) as flower:
            wait_until(lambda: "@" in flower.get("/workers", USER).body, "Flower")
            names = [f"r{number:02d}" for number in range(50)] + ["http", "engine"]
            results = {name: stand.client.send_task("corpus.use", (name,)) for name in names}
            for name, result in results.items():
                error = result.get(timeout=PATIENCE, propagate=False)
                assert isinstance(error, Exception), name
                said[f"result {name}"] = f"{error!r} {error} {result.traceback}"
            assert "HTTPStatusError" in said["result r00"]
            assert "password authentication failed" in said["result r20"]
            wait_until(lambda: '"name": "workerpools' in worker.log() or "db.client" in worker.log(), "metrics")

            with stand.client.connection_for_write() as connection:
                inspect = stand.client.control.inspect(timeout=10.0, limit=1, connection=connection)
                said |= {name: json.dumps(getattr(inspect, name)()) for name in ("conf", "stats", "registered")}
            assert "workerpools_http_base_url" in said["conf"]
            with stand.client.connection_for_write() as connection:
                (pools,) = stand.client.control.broadcast(
                    "pools", reply=True, timeout=10.0, limit=1, connection=connection
                )
            said["pools"] = json.dumps(pools)
            assert '"r00"' in said["pools"]

            (node,) = pools
            for path in ("/", "/workers", f"/worker/{node}", "/tasks", "/pools", "/api/pools", "/metrics", "/broker"):
                said[f"Flower {path}"] = flower.get(path, USER).body
            for path in ("/api/workers?refresh=1", "/api/tasks?limit=1000", f"/task/{results['http'].id}"):
                answer = flower.get(path, USER)
                assert answer.status == 200, path
                said[f"Flower {path}"] = answer.body
            assert "HTTPStatusError" in said["Flower /api/tasks?limit=1000"]
            assert "workerpools_http_base_url" in said[f"Flower /worker/{node}"]
            said["Flower's log"] = flower.log()
        with redis.Redis.from_url(stand.broker_url, decode_responses=True) as backend:
            for key in backend.scan_iter("celery-task-meta-*"):
                said[key] = str(backend.get(key))
        assert worker.stop() == 0
    said["log"] = worker.log()
    assert "HTTP Request: GET http://127.0.0.1" in said["log"]
    assert '"trace_id"' in said["log"]
    assert "event Event(" in said["log"]
    assert ": DEBUG/" in said["log"]

    (tmp_path / "plain.py").write_text(PLAIN)
    for app, folder in (("tests.worker.corpus", "."), ("plain", tmp_path)):
        done = run(["celery", "-A", app, "report"], env=environment(env), cwd=folder, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "workerpools_http_base_url" in done.stdout
        said[f"report {app}"] = done.stdout + done.stderr
    found = {where: ends for where, text in said.items() if (ends := secrets_in(text))}
    assert found == {}


def secrets_in(text: str) -> list[str]:
    """Return the ends of secrets in a text, also in Base64, as a header would have them."""
    ends = [f"{end}{number:02d}" for number in range(52) for end in ("s3cr3t", "t4il")]
    found: list[Any] = [end for end in ends if end in text]
    found += [end for end in ("Basic bWU6", base64.b64encode(b"me:s3cr3t")[:11].decode()) if end in text]
    return found
