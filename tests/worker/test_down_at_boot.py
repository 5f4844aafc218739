"""A server that is away when the worker starts is the tasks' trouble, not the worker's."""

from __future__ import annotations

import sys

import pytest

from tests.support.proxy import TcpProxy
from tests.support.stand import Stand

pytestmark = pytest.mark.worker


def test_a_database_that_is_down_at_boot_does_not_loop_the_children(stand: Stand) -> None:
    """The worker becomes ready while its database accepts and never answers, and while it refuses; tasks fail with the
    driver's own error, which names the resource; the same children serve when the database is there."""
    with TcpProxy(stand.database.host, stand.database.port) as proxy:
        proxy.blackhole()
        url = stand.database.through(proxy).url()
        with stand.worker(concurrency=2, env={"SHOP_DATABASE": url}) as worker:
            children = stand.pool_processes(2)
            # Not one connection was tried before a task asked for one: recorded in the children, and seen from outside.
            assert proxy.accepted == 0
            # Takes the whole connect timeout, which is longer than the four seconds that Celery gives a child to start.
            silent = stand.outcome("visit", "silent")
            assert silent.state == "FAILURE"
            assert "timeout expired" in str(silent.result)
            proxy.stop()
            proxy.close_all()
            proxy.pass_through()
            refused = stand.outcome("visit", "refused")
            assert refused.state == "FAILURE"
            assert "Connection refused" in str(refused.result)
            for result in (silent, refused):
                assert "OperationalError" in repr(result.result)
                assert "sqlalchemy.exc.OperationalError" in result.traceback
                if sys.version_info >= (3, 11):
                    assert "the resource 'db'" in result.traceback
            if sys.version_info >= (3, 11):
                assert "the resource 'db'" in worker.log()
            assert worker.children() == children

            proxy.start()
            answers = stand.reach_all(children)
            assert {answer["pid"] for answer in answers} == set(children)
            assert {entry.pid for entry in stand.entries("process_init")} == set(children)
            assert worker.stop() == 0
    stand.wait_for_no_connection()
