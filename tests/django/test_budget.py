"""Django's connections in the budget: on the command line, in the check, and on Flower's page, from the settings."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import django
import pytest
from celery import Celery

from demo_tasks.servers import Workspace
from tests.support.databases import Database
from tests.support.flower import FlowerProcess
from tests.support.paths import ROOT, environment
from tests.support.pgbouncer import PgBouncer, pgbouncer_program
from tests.support.recorder import PATH
from tests.support.services import require_program
from tests.support.stand import PATIENCE, wait_until
from tests.support.worker import WorkerProcess

pytestmark = [pytest.mark.worker, pytest.mark.timeout(170)]

PROJECT = "tests.django.project.celery:app"
POOL = {"OPTIONS": {"pool": {"min_size": 1, "max_size": 4}}}


def project(database: Database, broker_url: str, driver: str = "psycopg", **own: Any) -> dict[str, str]:
    """Return the environment of the project."""
    of_it = {
        "HOST": database.host,
        "PORT": database.port,
        "NAME": database.name,
        "USER": database.user,
        "PASSWORD": database.password,
    }
    return {
        "DJANGO_SETTINGS_MODULE": "tests.django.project.settings",
        "PROJECT_BROKER": broker_url,
        "PROJECT_DATABASE": json.dumps({**of_it, **own}),
        "PROJECT_DRIVER": driver,
    }


def command(env: Mapping[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "celery", "-A", PROJECT, "pools", *args]
    return subprocess.run(
        whole, cwd=ROOT, env=environment(env), capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def limits(env: Mapping[str, str], *args: str) -> list[dict[str, Any]]:
    done = command(env, "budget", "--json", *args)
    assert (done.returncode, done.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(done.stdout)["limits"]
    return found


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_each_alias_is_a_connection(database: Database, broker_url: str, driver: str) -> None:
    """Of each process, or each thread; those in files are none."""
    env = project(database, broker_url, driver)
    (limit,) = limits(env, "--workers", "3", "--concurrency", "10")
    assert (limit["limit"], limit["resources"], limit["sum"]) == ("max_connections", {"django": 3 * 10 * 2}, 60)
    (limit,) = limits(env, "--workers", "3", "--concurrency", "10", "-P", "threads")
    assert limit["resources"] == {"django": 3 * 10 * 2}
    assert limit["largest_concurrency"] == (limit["most"] - limit["reserved"] - limit["others"]) // (3 * 2)
    too_many = command(env, "check", "--budget", "--json", "--workers", "40", "--concurrency", "10")
    (found,) = (each for each in json.loads(too_many.stdout)["findings"] if each["code"].startswith("WP4"))
    assert (found["code"], found["where"]) == ("WP401", "django")
    assert database.password not in too_many.stdout


@pytest.mark.skipif(django.VERSION < (5, 1), reason="Django has psycopg's pool since 5.1")
def test_a_pool_counts_with_its_size(database: Database, broker_url: str) -> None:
    """In each process once, whatever the number of its threads."""
    env = project(database, broker_url, **POOL)
    (limit,) = limits(env, "--workers", "3", "--concurrency", "10")
    assert limit["sum"] == 3 * 10 * (4 + 1)
    (limit,) = limits(env, "--workers", "3", "--concurrency", "10", "-P", "threads")
    assert limit["sum"] == 3 * (4 + 10)
    (limit,) = limits(project(database, broker_url, OPTIONS={"pool": True}), "--workers", "3", "--concurrency", "1")
    assert limit["sum"] == 3 * (4 + 1)


def test_each_server_has_its_own(database: Database, broker_url: str, workspace: Workspace) -> None:
    """An alias by way of PgBouncer counts against its limits, and not against the server's."""
    require_program(pgbouncer_program)
    settings = {"max_client_conn": "50", "stats_users": database.user}
    with PgBouncer(workspace, database, settings=settings, name="django-budget") as bouncer:
        other = {"HOST": bouncer.database.host, "PORT": bouncer.database.port}
        env = {**project(database, broker_url), "PROJECT_OTHER": json.dumps(other)}
        found = {each["limit"]: each for each in limits(env, "--workers", "2", "--concurrency", "10")}
    assert [each["sum"] for each in found.values()] == [20, 20, 20]
    assert found["max_client_conn"]["most"] == 50
    assert found["max_client_conn"]["server"].startswith("PgBouncer at ")
    assert found["max_client_conn"]["largest_concurrency"] == 25


def test_a_server_that_refuses(database: Database, broker_url: str) -> None:
    """The reason is told, and no password is."""
    (limit,) = limits(project(database, broker_url, PASSWORD="wr-ong"), "--workers", "1", "--concurrency", "1")[:1]
    assert "password authentication failed" in limit["unknown"]
    assert "wr-ong" not in str(limit)


def test_of_a_worker_that_runs(database: Database, broker_url: str, workspace: Workspace, tmp_path: Path) -> None:
    """What it has open is in the sum, and not among the others; Flower's page has the same numbers."""
    env = project(database, broker_url, CONN_MAX_AGE=None)
    env[PATH] = str(tmp_path / "record.jsonl")
    subprocess.run([sys.executable, "-m", "django", "migrate", "-v0"], cwd=ROOT, env=environment(env), check=True)
    with (
        WorkerProcess(PROJECT, concurrency=2, env=env) as worker,
        closing(Celery("client", broker=broker_url, backend=broker_url, set_as_current=False)) as client,
    ):
        asked = ("-d", worker.node, "--timeout", "20")
        (before,) = limits(env, *asked)
        assert (before["sum"], before["open"], before["others"]) == (2 * 2, 0, 0)
        client.send_task("shop.place", (1,)).get(timeout=PATIENCE)
        client.backend.result_consumer.stop()
        (after,) = limits(env, *asked)
        assert (after["sum"], after["open"], after["others"]) == (2 * 2, 1, 0)
        with FlowerProcess(workspace, broker_url, app=PROJECT, env=env) as flower:
            wait_until(lambda: flower.document()["workers"], "the worker in Flower")
            assert flower.get("/api/pools", method="POST").status == 202
            servers = wait_until(
                lambda: (told := flower.document()["servers"])["asked"] and told, "the servers' answers"
            )
        assert servers["budget"]["limits"] == [after]
