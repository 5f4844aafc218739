"""What a real worker does with a task that fails after its COMMIT, and what its log says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stand import Stand, wait_until
from tests.support.worker import WorkerProcess

pytestmark = pytest.mark.worker

APP = "tests.worker.sessions:app"

INI = """\
[alembic]
script_location = {folder}
[loggers]
keys = root
[handlers]
keys = console
[formatters]
keys = generic
[logger_root]
level = WARNING
handlers = console
[handler_console]
class = StreamHandler
args = (sys.stderr,)
level = NOTSET
formatter = generic
[formatter_generic]
format = %(levelname)-5.5s [%(name)s] %(message)s
"""

ENVIRONMENT = """\
from logging.config import fileConfig

from alembic import context

config = context.config
if config.attributes.get("configure_logger", True):
    fileConfig(config.config_file_name)
context.configure(connection=config.attributes["connection"], target_metadata=None)
with context.begin_transaction():
    context.run_migrations()
"""

VERSION = """\
from alembic import op

revision, down_revision = "a1", None


def upgrade():
    op.execute("alter table orders add column note text")
"""


@pytest.fixture(scope="module")
def worker(shared: Stand) -> Iterator[WorkerProcess]:
    with shared.worker(app=APP, concurrency=1) as started:
        yield started


def lines(worker: WorkerProcess, *words: str) -> list[str]:
    return [line for line in worker.log().splitlines() if all(word in line for word in words)]


def test_a_listener_that_fails_after_the_commit(shared: Stand, worker: WorkerProcess) -> None:
    """The task fails once, its row is there, and the log says so."""
    result = shared.outcome("hook", 1)
    assert result.state == "FAILURE"
    assert isinstance(result.result, ZeroDivisionError)
    assert shared.orders(1) == [0]
    worker.wait_for_log("failed_after_commit task=shop.hook error=ZeroDivisionError effects=COMMIT by 'db'")
    assert len(lines(worker, "failed_after_commit", "shop.hook")) == 1


def test_a_result_that_cannot_be_encoded(shared: Stand, worker: WorkerProcess) -> None:
    """An ORM object: the body had returned, and its row is committed. Without effects there is nothing to say."""
    result = shared.outcome("row", 2)
    assert result.state == "FAILURE"
    assert type(result.result).__name__ == "EncodeError"
    assert shared.orders(2) == [0]
    worker.wait_for_log("failed_after_commit task=shop.row error=EncodeError effects=COMMIT by 'db'")
    assert shared.outcome("read_row").state == "FAILURE"
    worker.wait_for_log("Task shop.read_row")
    assert len(lines(worker, "failed_after_commit", "shop.read_row")) == 0


def test_a_result_that_nobody_reads(shared: Stand, worker: WorkerProcess) -> None:
    """It is not encoded."""
    shared.send("ignored_row", 3)
    assert shared.outcome("read_row").state == "FAILURE"
    assert shared.orders(3) == [0]
    assert lines(worker, "failed_after_commit", "shop.ignored_row") == []


@pytest.mark.parametrize("configures", [True, False])
def test_migrations_that_configure_logging(stand: Stand, tmp_path: Path, configures: bool) -> None:
    """Alembic's env.py reads alembic.ini's part about logging: in a worker that silences it, unless env.py is told."""
    (tmp_path / "alembic.ini").write_text(INI.format(folder=tmp_path))
    (tmp_path / "env.py").write_text(ENVIRONMENT)
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / "a1.py").write_text(VERSION)
    with stand.worker(app=APP, concurrency=1) as worker:
        assert stand.outcome("lost").state == "FAILURE"
        wait_until(lambda: lines(worker, "replay_refused"), "the line about the second loss")
        assert len(lines(worker, "attempt_replayed")) == 1
        stand.call("migrate", str(tmp_path / "alembic.ini"), configures)
        assert stand.database.execute("select version_num from alembic_version") == [("a1",)]
        assert stand.outcome("lost").state == "FAILURE"
        if not configures:
            wait_until(lambda: len(lines(worker, "replay_refused")) == 2, "the line about the fourth loss")
        assert len(lines(worker, "attempt_replayed")) == (1 if configures else 2)
