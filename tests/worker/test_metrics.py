"""The endpoint of a worker's main process, and what it and OpenTelemetry show of children that come and go."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from demo_tasks.servers import Workspace
from tests.support.flower import FlowerProcess
from tests.support.inspect import socket_inodes
from tests.support.promtool import check_metrics
from tests.support.stand import PATIENCE, Stand, wait_until
from tests.support.worker import WorkerProcess
from tests.worker.scraping import Series, address, exported, fallen, fetch, scrape, series, summed, total
from tests.worker.seeing import look, run
from workerpools._stats.snapshot import ResourceStats, WorkerStats, merged

pytestmark = pytest.mark.worker

ANY_PORT = {"workerpools_metrics_port": 0}


def listening(port: int) -> int:
    """Return the inode of the socket that listens on a port of this machine."""
    wanted = f"0100007F:{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (found,) = (int(row[9]) for row in rows if row[1] == wanted and row[3] == "0A")
    return found


def can_listen(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True


def test_promtool_accepts_what_a_worker_serves(shared: Stand) -> None:
    """On the loopback address alone, under the worker's own name."""
    with shared.worker(conf=ANY_PORT) as worker:
        run(shared, 10)
        text = scrape(worker)
        check_metrics(text)
        found = series(text)
        assert total(found, "workerpools_attempts_total", resource="api") == 10
        assert total(found, "workerpools_acquire_wait_seconds_count", resource="db") == 10
        assert total(found, "workerpools_processes_running") == 2
        assert {dict(labels).get("worker") for name, labels in found} == {worker.node}
        assert address(worker)[0] == "127.0.0.1"


def test_without_the_setting_nothing_listens(shared: Stand) -> None:
    """And the client library is not even loaded."""
    with shared.worker() as worker:
        assert "serving metrics" not in worker.log()
        maps = Path(f"/proc/{worker.pid}/net/tcp").read_text()
        inodes = socket_inodes(worker.pid)
        rows = [line.split() for line in maps.splitlines()[1:]]
        assert not [row for row in rows if row[3] == "0A" and int(row[9]) in inodes]


def test_no_child_has_the_port(stand: Stand) -> None:
    """Neither the first ones nor their successors: when the main process is killed, another can listen at once."""
    with stand.worker(conf=ANY_PORT) as worker:
        _, port = address(worker)
        socket_number = listening(port)
        assert socket_number in socket_inodes(worker.pid)
        os.kill(worker.children()[0], signal.SIGKILL)
        run(stand, 10)
        children = wait_until(lambda: found if len(found := worker.children()) == 2 else None, "a successor")
        for pid in children:
            assert socket_number not in socket_inodes(pid)
        assert scrape(worker)
        worker.kill(children=False)
        assert can_listen(port)


def test_a_warm_stop_is_seen_until_its_last_task(stand: Stand) -> None:
    """While it waits for the task that runs; then the port is free."""
    with stand.worker(concurrency=1, conf=ANY_PORT) as worker:
        _, port = address(worker)
        result = stand.send("slow_request", 4.0)
        stand.wait_for_entry("slow_request")
        os.kill(worker.pid, signal.SIGTERM)
        worker.wait_for_log("Warm shutdown")
        assert total(series(scrape(worker)), "workerpools_connections_in_use") > 0
        assert worker.wait() == 0
        result.get(timeout=PATIENCE)
        assert can_listen(port)


def test_a_port_in_use(shared: Stand) -> None:
    """One clear line, and the worker works."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with shared.worker(conf={"workerpools_metrics_port": port}) as worker:
            assert len(run(shared, 4)) == 4
            (line,) = [line for line in worker.log().splitlines() if "cannot listen" in line]
            assert f"cannot listen on workerpools_metrics_host 127.0.0.1, workerpools_metrics_port {port}: " in line
            assert "Address already in use" in line
            assert "Traceback" not in worker.log()
            assert worker.stop() == 0


def test_without_the_library(shared: Stand, tmp_path: Path) -> None:
    """It says what to install, and the worker works."""
    (tmp_path / "prometheus_client.py").write_text("raise ModuleNotFoundError(name=__name__)\n")
    paths = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""), str(Path.cwd())))
    with shared.worker(conf=ANY_PORT, env={"PYTHONPATH": paths}, fresh=True) as worker:
        assert len(run(shared, 4)) == 4
        assert worker.log().count("which the extra 'prometheus' brings: pip install prometheus-client") == 1


@pytest.mark.parametrize(("pool", "concurrency"), [("threads", 4), ("solo", 1)])
def test_tasks_that_run_in_the_main_process(stand: Stand, pool: str, concurrency: int) -> None:
    """It serves what it counts itself; a scrape waits for no task."""
    with stand.worker(pool=pool, concurrency=concurrency, conf=ANY_PORT) as worker:
        run(stand, 20)
        result = stand.send("slow_request", 3.0)
        stand.wait_for_entry("slow_request")
        text = scrape(worker)
        check_metrics(text)
        found = series(text)
        assert total(found, "workerpools_attempts_total", resource="db") == 20
        assert total(found, "workerpools_connections_in_use", resource="db") == 1
        assert total(found, "workerpools_connections_opened_total", resource="api") == stand.echo.accepted
        result.get(timeout=PATIENCE)
        assert worker.stop() == 0


def agree(stand: Stand, found: Series, points: dict[str, Any], tasks: int) -> None:
    """Check both exporters against what the servers and the tasks have seen."""
    opened = {name: total(found, "workerpools_connections_opened_total", resource=name) for name in ("api", "db")}
    assert opened["api"] == stand.echo.accepted
    for name in ("api", "db"):
        assert total(found, "workerpools_attempts_total", resource=name) == tasks
        assert total(found, "workerpools_acquire_wait_seconds_count", resource=name) == tasks
        assert total(found, "workerpools_acquisitions_reused_total", resource=name) == tasks - opened[name]
        assert summed(points, "workerpools.attempts", workerpools__resource=name) == tasks
        assert summed(points, "workerpools.connections.opened", workerpools__resource=name) == opened[name]
    backends = len(stand.backends("workerpools db pid=%"))
    assert total(found, "workerpools_connections_open", resource="db") == backends
    assert summed(points, "db.client.connection.count", db__client__connection__pool__name="db") == backends
    for name in ("wait_time", "use_time"):
        full = f"db.client.connection.{name}"
        assert summed(points, full, db__client__connection__pool__name="db") == tasks
    assert summed(points, "db.client.connection.create_time", db__client__connection__pool__name="db") == opened["db"]
    assert summed(points, "workerpools.acquire_wait", workerpools__resource="api") == tasks
    closed = total(found, "workerpools_open_time_seconds_count", resource="api")
    assert closed == total(found, "workerpools_connections_closed_total", resource="api")
    assert summed(points, "http.client.connection.duration", workerpools__resource="api") == closed
    assert total(found, "workerpools_processes_running") == summed(points, "workerpools.processes.running")


def same(stand: Stand, flower: FlowerProcess, scraped: Series) -> None:
    """Check what `inspect pools`, Flower's document and Flower's `/metrics` say against what the worker's own port
    says."""
    told = {each.name: each for each in look(stand).totals()}
    for name in ("api", "db"):
        for number, of_series in (
            ("opened", "workerpools_connections_opened_total"),
            ("closed", "workerpools_connections_closed_total"),
            ("reused", "workerpools_acquisitions_reused_total"),
            ("attempts", "workerpools_attempts_total"),
        ):
            expected = total(scraped, of_series, resource=name)
            assert told[name].value(number) == expected, (name, number)

            def agrees(name: str = name, number: str = number, expected: float = expected) -> bool:
                return in_flower(flower)[name].value(number) == expected

            wait_until(agrees, f"{number} of {name} in Flower")
            assert total(series(fetch(flower.url("/metrics"))), of_series, resource=name) == expected


def in_flower(flower: FlowerProcess) -> dict[str, ResourceStats]:
    """Return the totals of all workers in the document of Flower's page."""
    snapshots = [each for worker in flower.document()["workers"] for each in worker["snapshots"]]
    totals = merged(each for snapshot in snapshots for each in WorkerStats.from_dict(snapshot).totals())
    return {each.name: each for each in totals}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_everything_that_shows_them_agrees_with_the_servers_while_children_are_killed_and_recycled(
    stand: Stand, tmp_path: Path
) -> None:
    """Eight children of a few tasks each, one killed now and then, and scraped all the while: no counter falls, and in
    the end everything is accounted for: by the worker's port, OpenTelemetry, `inspect pools`, Flower's page and its
    `/metrics`. Of the children nobody exports but their parent."""
    path = tmp_path / "exported.jsonl"
    worker = stand.worker(
        app="tests.worker.exporting:app",
        concurrency=8,
        args=["--max-tasks-per-child", "12"],
        conf=ANY_PORT,
        env={"SHOP_METRICS": str(path)},
    )
    with worker, Workspace() as workspace, FlowerProcess(workspace, stand.broker_url) as flower:
        before, tasks = series(scrape(worker)), 0
        for _ in range(6):
            answers = [result.get(timeout=PATIENCE) for result in [stand.send("visit", str(n)) for n in range(24)]]
            tasks += len(answers)
            before = watched(worker, before)
            # Idle: what a child has counted is published when its task has ended.
            os.kill(worker.children()[0], signal.SIGKILL)
            wait_until(lambda: len(worker.children()) == 8, "eight children")
            before = watched(worker, before)
        # Some are still on their way out, with connections that the servers count until then.
        wait_until(lambda: settled(stand, worker), "as many children as connections are shown for")
        last = watched(worker, before)
        seen = len(exported(path))
        wait_until(lambda: len(exported(path)) > seen + 1, "an export after that")
        points = exported(path)
        agree(stand, last, points[-1], tasks)
        same(stand, flower, last)
        opened = [summed(each, "workerpools.connections.opened") for each in points]
        assert opened == sorted(opened)
        uses = [summed(each, "db.client.connection.use_time") for each in points]
        assert uses == sorted(uses)
        # One for each use: no child has told of its own as well.
        assert last[("workerpools_processes_running", (("worker", worker.node),))] == 8
        assert total(last, "workerpools_connections_opened_total", resource="db") > 8
        check_metrics(scrape(worker))
        assert worker.stop() == 0


def test_the_last_export_is_complete(stand: Stand, tmp_path: Path) -> None:
    """It comes when the children have ended: with the tasks that a warm stop waited for, and everything closed."""
    path = tmp_path / "exported.jsonl"
    with stand.worker(app="tests.worker.exporting:app", env={"SHOP_METRICS": str(path)}) as worker:
        tasks = len(stand.reach_all(worker.children()))
        last = [stand.send("slow_request", 2.0) for _ in range(2)]
        stand.wait_for_entry("slow_request", count=2)
        assert worker.stop() == 0
        assert [result.get(timeout=PATIENCE) for result in last]
    points = exported(path)[-1]
    for name in ("api", "db"):
        assert summed(points, "workerpools.attempts", workerpools__resource=name) == tasks + 2
        opened = summed(points, "workerpools.connections.opened", workerpools__resource=name)
        closed = {"workerpools__resource": name, "workerpools__reason": "shutdown"}
        assert summed(points, "workerpools.connections.closed", **closed) == opened == 2
    assert summed(points, "db.client.connection.count") == summed(points, "http.client.open_connections") == 0
    assert summed(points, "http.client.connection.duration") == stand.echo.accepted == 2


def watched(worker: WorkerProcess, before: Series) -> Series:
    """Scrape once more; no counter may have fallen."""
    after = series(scrape(worker))
    assert fallen(before, after) == [], worker.log()
    return after


def settled(stand: Stand, worker: WorkerProcess) -> bool:
    found = series(scrape(worker))
    backends = len(stand.backends("workerpools db pid=%"))
    return (
        len(worker.children()) == 8
        and total(found, "workerpools_processes_running") == 8
        and total(found, "workerpools_connections_open", resource="db") == backends
    )
