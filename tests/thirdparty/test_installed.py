"""The adapter of this folder in a distribution of its own: found by its entry point, with settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.memcached import MemcachedServer
from tests.support.paths import environment

CODE = """
from celery import Celery
from pymemcache.exceptions import MemcacheError

from tests.thirdparty.memcached import Memcached
from workerpools import ConfigurationError, PooledTask, WorkerPools
from workerpools.bases import from_settings

app = Celery("cached", set_as_current=False)


class CachedTask(PooledTask):
    cache = from_settings(Memcached)


@app.task(base=CachedTask, bind=True)
def read(self):
    return self.cache.get("key", b"nothing").decode()
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder in which the distribution is installed."""
    info = tmp_path / "workerpools_memcached-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: workerpools-memcached\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[workerpools.adapters]\npymemcache = tests.thirdparty.memcached:Memcached\n"
    )
    return tmp_path


def run(folder: Path, code: str, **variables: str) -> str:
    env = environment(variables)
    env["PYTHONPATH"] = os.pathsep.join((str(folder), env["PYTHONPATH"]))
    done = subprocess.run([sys.executable, "-c", CODE + code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_its_settings_make_a_task_base(memcached: MemcachedServer, installed: Path) -> None:
    """From the app's configuration and from the environment."""
    memcached.ask("set key 0 0 5\r\nvalue")
    asked = """
app.conf.workerpools_memcached_host = "127.0.0.1"
print(read())
(stats,) = WorkerPools.of(app).stats().totals()
print(stats.name, stats.kind, int(stats.value("opened")))
"""
    found = run(installed, asked, WORKERPOOLS_MEMCACHED_PORT=str(memcached.port))
    assert found.splitlines() == ["value", "cache cache 1"]


def test_a_mistake_is_refused_with_what_was_meant(installed: Path) -> None:
    """Its settings are known, and so is what is like one of them."""
    asked = """
app.conf.workerpools_memcached_hots = "127.0.0.1"
try:
    read()
except ConfigurationError as error:
    print(error)
"""
    assert "workerpools_memcached_host" in run(installed, asked)
