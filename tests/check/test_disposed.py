"""What becomes of the parent's connection when a forked child drops it, closes it, or uses it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.databases import Database
from tests.support.mariadb import MariaDatabase

_SCRIPT = """
import gc, json, os, sys
from sqlalchemy import create_engine
url, question, how = sys.argv[1:]
engine = create_engine(url)
def session():
    with engine.connect() as connection:
        return connection.exec_driver_sql(question).scalar()
before = session()
read, write = os.pipe()
if not os.fork():
    if how:
        engine.dispose(close=how == "close")
        gc.collect()
    os.write(write, str(session()).encode())
    os._exit(0)
os.close(write)
child = int(os.read(read, 99))
os.wait()
try:
    after = session()
except Exception as error:
    after = type(error).__name__
print(json.dumps([before, child, after]))
"""


def sessions(url: str, question: str, how: str) -> list[object]:
    """The server's number of the session of the parent, of its child, and of the parent once the child has ended."""
    command = [sys.executable, "-c", _SCRIPT, url, question, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def judge(url: str, question: str) -> None:
    """Dropped, both go on; closed, the parent's is gone; and without either the two share one."""
    before, child, after = sessions(url, question, "drop")
    assert before == after != child
    before, child, after = sessions(url, question, "close")
    assert before not in (child, after)
    before, child, _ = sessions(url, question, "")
    assert before == child


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_postgresql(database: Database, driver: str) -> None:
    """Drivers that look at the process."""
    judge(database.url(driver), "SELECT pg_backend_pid()")


def test_mariadb(maria_database: MariaDatabase) -> None:
    """A driver that closes its descriptor."""
    judge(maria_database.url(), "SELECT CONNECTION_ID()")
