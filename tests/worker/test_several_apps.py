"""Several applications, and several WorkerPools, in one process do not disturb each other."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.paths import environment
from tests.support.stand import Stand

pytestmark = pytest.mark.worker


def test_two_workers_in_one_process(stand: Stand) -> None:
    """Each application's worker has its own values, of its own sizes; when one worker ends, it closes its own alone,
    and a task that is in the middle of its body in the other one is not disturbed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.worker.neighbours"],
        env=environment(stand.environment()),
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("SEEN "))
    seen = json.loads(line.removeprefix("SEEN "))
    print(json.dumps(seen, indent=1))
    assert seen["first"]["right"]
    assert seen["second"]["right"]
    assert seen["first"]["backend"] != seen["second"]["backend"]
    assert seen["first"]["engine"] != seen["second"]["engine"]
    assert (seen["first"]["size"], seen["second"]["size"]) == (3, 1)
    assert seen["open"] == [["api", "first"], []]
    assert seen["in the middle"] is True
    assert {**seen["first again"], "backend": 0} == {**seen["first"], "backend": 0}
    assert seen["open at the end"] == []
    stand.wait_for_no_connection()
    assert stand.disorderly_ends() == 0


def test_an_application_that_uses_anothers_task_base(stand: Stand) -> None:
    """The worker of one application opens, sizes and closes the resources of both."""
    with stand.worker(app="tests.worker.outlet:app", concurrency=2) as worker:
        children = worker.children()
        answers = [*stand.reach_all(children, "outlet"), *stand.reach_all(children, "outlet")]
        assert all(answer["right"] and answer["sizes"] == [1, 1] for answer in answers)
        assert len({backend for answer in answers for backend in answer["backends"]}) == 2 * len(children)
        assert len(stand.backends()) == 2 * len(children)
        assert worker.stop() == 0
        log = worker.log()
    for pid in children:
        for resource in ("api", "db", "outlet"):
            assert log.count(f"value_closed resource={resource} pid={pid}") == 1
    stand.wait_for_no_connection()
    assert stand.disorderly_ends() == 0
