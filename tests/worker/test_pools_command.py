"""``celery pools status``: what it says of real workers, and how it ends where there is nothing to say."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import environment
from tests.support.stand import PATIENCE, SHOP, Stand, wait_until
from tests.worker.test_recycle_command import pools
from tests.worker.test_seen import run

pytestmark = pytest.mark.worker

PLAIN = "from celery import Celery\napp = Celery('plain', broker={broker!r})\n"


def test_a_table_of_every_process(shared: Stand) -> None:
    """Each with its resources, and the totals above; in 80 columns, and without a terminal."""
    with shared.worker(concurrency=2) as worker:
        shared.reach_all(worker.children())
        name = worker.node
        done = pools(shared, "status", "-d", name, "--timeout", "20")
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert lines[0].rstrip() == f"{name}  prefork, 2 processes"
        rows = [re.split(r"\s{1,}", line.strip()) for line in lines]
        assert ["total", "api", "0/2/20", "0"] in [row[:4] for row in rows]
        assert ["db", "0/2/4", "0"] in [row[:3] for row in rows]
        for index, pid in enumerate(worker.children()):
            assert [str(index), str(pid), "api", "0/1/10"] in [row[:4] for row in rows]
        assert "not used yet: engine, http, stock" in done.stdout
        assert all(len(line.rstrip()) <= 80 for line in lines)
        assert "\x1b" not in done.stdout
        totals = pools(shared, "status", "--totals", "-d", name, "--timeout", "20").stdout
        assert str(worker.children()[0]) not in totals
        assert "0/2/4" in totals


def test_a_document_for_scripts(shared: Stand) -> None:
    """One JSON document: every number, those that are 0 as well."""
    with shared.worker(concurrency=2) as worker:
        answers = shared.reach_all(worker.children())
        name = worker.node
        done = pools(shared, "status", "--json", "-d", f"{name},nobody@nowhere", "--timeout", "3")
        # Somebody is missing: told in the document and by the status, and the rest is there all the same.
        assert done.returncode == 69
        assert done.stderr == "Error: no reply in time from nobody@nowhere\n"
        told = json.loads(done.stdout)
        assert (told["version"], told["missing"]) == (1, ["nobody@nowhere"])
        (stats,) = told["workers"][name]
        assert {process["pid"] for process in stats["processes"]} == set(worker.children())
        for each in (stats["totals"]["db"], *(process["resources"]["db"] for process in stats["processes"])):
            assert (each["kind"], each["pending"], each["closed"]["recycled"], each["in_use"]) == ("database", 0, 0, 0)
            assert each["acquire_wait"]["count"] == each["attempts"] == each["opened"] + each["reused"]
            assert 0 <= each["reuse_ratio"] < 1
        assert stats["totals"]["db"]["attempts"] == len(answers)
        assert stats["totals"]["stock"]["reuse_ratio"] is None
        assert pools(shared, "status", "--json", "-d", name, "--timeout", "20").returncode == 0


def test_nobody_answers(shared: Stand) -> None:
    """One clear sentence without the broker's password, and a status that a script can tell from others."""
    done = pools(shared, "status", "--timeout", "0.2")
    assert (done.returncode, done.stdout) == (69, "")
    assert "no reply from any worker within 0.2 s: is it running on the broker redis://" in done.stderr
    assert ":**@127.0.0.1" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = pools(shared, "recycle", "--timeout", "0.2", "-d", "one@here,two@here", "--json")
    assert done.returncode == 69
    assert json.loads(done.stdout) == {"version": 1, "workers": {}, "missing": ["one@here", "two@here"]}
    assert "no reply from one@here, two@here within 0.2 s" in done.stderr
    done = pools(shared, "status", "--timeout", "0.2", "--json")
    assert done.returncode == 69
    assert json.loads(done.stdout)["workers"] == {}


def test_a_broker_that_is_down(shared: Stand) -> None:
    """Said as such; the address is named, the password is not."""
    with socket.socket() as taken:
        # A port of our own on which nobody listens.
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        done = pools(shared, "status", env={"SHOP_BROKER": f"redis://:hidden@127.0.0.1:{port}/0"})
    assert done.returncode == 69
    assert re.fullmatch(rf"Error: cannot reach the broker redis://:\*\*@127.0.0.1:{port}/0: .*\n", done.stderr), (
        done.stderr
    )


def test_an_app_without_pools(shared: Stand, tmp_path: Path) -> None:
    """Most likely the wrong app was named."""
    (tmp_path / "plain.py").write_text(PLAIN.format(broker=shared.broker_url))
    path = os.pathsep.join((str(tmp_path), environment()["PYTHONPATH"]))
    for command in ("status", "recycle"):
        done = pools(shared, command, "--timeout", "0.2", app="plain:app", env={"PYTHONPATH": path})
        assert done.returncode == 69
        assert "no worker replied, and the app plain has no WorkerPools: declare one" in done.stderr


HIDDEN = "import sys; sys.modules['rich'] = None; from celery.__main__ import main; sys.exit(main())"


def test_without_rich(shared: Stand) -> None:
    """The same table, and everything else."""

    def without(*args: str) -> Any:
        return subprocess.run(
            [sys.executable, "-c", HIDDEN, "-A", SHOP, "pools", *args],
            env=environment(shared.environment()),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    with shared.worker(concurrency=1) as worker:
        run(shared, 1)
        name = worker.node
        done = without("status", "-d", name, "--timeout", "20")
        assert (done.returncode, done.stderr) == (0, "")
        with_rich = pools(shared, "status", "-d", name, "--timeout", "20").stdout
        assert [line.rstrip() for line in with_rich.splitlines()] == done.stdout.splitlines()
        (pid,) = worker.children()
        assert re.search(rf"^ 0 {pid} +api +0/1/10 +0 ", done.stdout, re.MULTILINE), done.stdout
        done = without("status", "--json", "-d", name, "--timeout", "20")
        assert done.returncode == 0
        assert list(json.loads(done.stdout)["workers"]) == [name]
        said = f"{name}: connections of api, db, engine, http, stock will be replaced on next use\n"
        assert without("recycle", "-d", name, "--timeout", "20").stdout == said


def in_foreground() -> None:
    # What a shell starts in the background ignores it, and so would all that a test run in the background starts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_watching_without_a_terminal(stand: Stand, tmp_path: Path) -> None:
    """A line for each resource each time; workers that come and go are followed; Ctrl-C is a good end."""
    log = tmp_path / "watched"
    command = [sys.executable, "-m", "celery", "-A", SHOP, "pools", "status", "--watch", "--timeout", "0.5"]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, "--interval", "0.1"],
            env=environment(stand.environment()),
            stdout=output,
            stderr=output,
            preexec_fn=in_foreground,
        ) as watching,
    ):
        try:
            wait_until(lambda: "no reply from any worker" in log.read_text(), "a word about nobody")
            with stand.worker(concurrency=1):
                run(stand, 3)
                line = (
                    r"\d\d:\d\d:\d\d \S+@\S+ db in_use=0 open=1 limit=2 pending=0 .* reused=0.67 failures=0 replays=0"
                )
                wait_until(lambda: re.search(line, log.read_text()), "a line")
            watching.send_signal(signal.SIGINT)
            assert watching.wait(PATIENCE) == 0
        finally:
            watching.kill()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("rich", [True, False])
def test_watching_in_a_terminal(shared: Stand, rich: bool) -> None:
    """The table is drawn again in its own place; Ctrl-C is a good end, and the cursor is there again."""
    ours, theirs = pty.openpty()
    env = environment({**shared.environment(), "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"})
    start = ["-m", "celery"] if rich else ["-c", HIDDEN]
    command = [sys.executable, *start, "-A", SHOP, "pools", "status", "--watch", "--timeout", "0.5"]
    with shared.worker(concurrency=1):
        run(shared, 1)
        watching = subprocess.Popen(
            [*command, "--interval", "0.1"],
            env=env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=in_foreground,
        )
        os.close(theirs)
        seen = ""
        try:
            deadline = time.monotonic() + PATIENCE
            while seen.count("prefork") < 3:
                assert time.monotonic() < deadline, seen
                if select.select([ours], [], [], 1.0)[0]:
                    seen += os.read(ours, 65536).decode()
            watching.send_signal(signal.SIGINT)
            while watching.poll() is None:
                assert time.monotonic() < deadline
                if select.select([ours], [], [], 0.1)[0]:
                    try:
                        seen += os.read(ours, 65536).decode()
                    except OSError:
                        # Linux says so when the other side is closed.
                        break
            assert watching.wait(PATIENCE) == 0
        finally:
            watching.kill()
            watching.wait()
            os.close(ours)
    if rich:
        # Up and to the left again, over what was written before; the cursor was hidden meanwhile.
        assert "\x1b[1A" in seen
        assert seen.rindex("\x1b[?25h") > seen.index("\x1b[?25l")
    else:
        assert seen.count("\x1b[H\x1b[J") >= 3
        assert "?25" not in seen


def test_options_that_contradict(shared: Stand) -> None:
    """Refused before anybody is asked."""
    done = pools(shared, "status", "--json", "--watch")
    assert done.returncode == 2
    assert "--json prints a single document" in done.stderr
    assert pools(shared, "status", "--timeout", "0").returncode == 2
