"""Children that are replaced all the time leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.inspect import open_fds
from tests.support.stand import PATIENCE, Stand, wait_until

pytestmark = pytest.mark.worker

#: Through the broker of files, which is polled once a second.
TASKS = 10


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_80_children_leave_no_connection_and_no_descriptor(stand: Stand) -> None:
    """With max_tasks_per_child=1, 80 tasks use 80 children, each with connections of its own: none is left on the
    servers, all were closed in order, and the parent has as many descriptors as before."""
    with stand.worker(concurrency=4, args=["--max-tasks-per-child", "1"]) as worker:

        def run(count: int) -> set[int]:
            sent = [stand.send("visit", f"token-{number}") for number in range(count)]
            answers = [result.get(timeout=PATIENCE) for result in sent]
            assert all(answer["right"] for answer in answers)
            return {answer["pid"] for answer in answers}

        # The first ones open what the parent keeps for good: its connections to the broker.
        used = run(8)
        wait_until(lambda: len(worker.children()) == 4, "four children")
        before = len(open_fds(worker.pid))
        used |= run(72)
        assert len(used) == 80
        wait_until(lambda: len(worker.children()) == 4, "four children")
        wait_until(lambda: len(open_fds(worker.pid)) <= before, f"{before} descriptors, as before")
        stand.wait_for_no_connection()
        assert stand.disorderly_ends() == 0
        assert worker.stop() == 0
    assert stand.echo.accepted == 80


def test_children_forked_from_a_thread(stand: Stand, tmp_path: Path) -> None:
    """With a broker that has no event loop, replacement children are forked from a supervisor thread: they have their
    own connections all the same, and leave none."""
    for name in ("queue", "control"):
        (tmp_path / name).mkdir()
    folder = str(tmp_path / "queue")
    transport = {"data_folder_in": folder, "data_folder_out": folder, "control_folder": str(tmp_path / "control")}
    conf = {"broker_transport_options": transport}
    env = {"SHOP_BROKER": "filesystem://", "SHOP_PARENT": "import"}
    with stand.worker(concurrency=2, env=env, conf=conf, args=["--max-tasks-per-child", "1"]) as worker:
        with stand.client.connection_for_write("filesystem://", transport_options=transport) as connection:
            sent = [stand.send("visit", f"token-{number}", connection=connection) for number in range(TASKS)]
        answers = [result.get(timeout=PATIENCE) for result in sent]
        assert all(answer["right"] for answer in answers)
        assert len({answer["pid"] for answer in answers}) == TASKS
        assert len({answer["backend"] for answer in answers}) == TASKS
        assert worker.pid not in {answer["pid"] for answer in answers}
        # What the parent opened at import is still its own: a client, a connection in a transaction, an idle one.
        wait_until(lambda: len(stand.backends()) == 2, "no backend but the parent's")
        assert worker.stop() == 0
        assert stand.entries("parent committed")
    assert stand.orders(1) == [0]
    stand.wait_for_no_connection()
    assert stand.disorderly_ends() == 0
