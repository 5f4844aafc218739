"""Programs that are forked from an interpreter with its packages: what they are given, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.inspect import is_alive, open_fds
from tests.support.paths import ROOT, environment
from tests.support.program import Program, run
from tests.support.stand import PATIENCE

SEES = """\
    import atexit, os, signal, sys, tempfile
    class Last:
        def __del__(self): print("finalized")
    last = Last()
    atexit.register(print, "atexit")
    print(sorted(os.listdir("/proc/self/fd"))[:3], len(os.listdir("/proc/self/fd")))
    print(__name__, sys.argv[1:], os.path.basename(sys.argv[0]), sys.path[0] == os.getcwd())
    print(os.getsid(0) == os.getpid(), os.environ["ASKED"], "PRESENT" in os.environ, tempfile.gettempdir())
    print(signal.getsignal(signal.SIGCHLD), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    print([*signal.pthread_sigmask(0, ())])
    print(sorted({"workerpools", "gevent", "eventlet"} & set(sys.modules)), "sqlalchemy" in sys.modules)
    print("error", file=sys.stderr)
    sys.exit(7)
"""


def ran(folder: Path, code: str, *arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    (folder / "asked_for.py").write_text(textwrap.dedent(code))
    given = environment({"PYTHONPATH": str(folder), **(env or {})})
    done = run(["asked_for", *arguments], env=given, timeout=PATIENCE)
    return done.returncode, done.stdout, done.stderr


def test_a_program_is_what_an_interpreter_of_its_own_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with `python -m`, but for the packages that are there before it asks; the server's own variables and
    descriptors are not."""
    monkeypatch.setenv("PRESENT", "yes")
    asked = environment({"PYTHONPATH": str(tmp_path), "ASKED": "ümlaut", "TMPDIR": str(tmp_path)})
    del asked["PRESENT"]
    (tmp_path / "asked_for.py").write_text(textwrap.dedent(SEES))
    own = subprocess.run(
        [sys.executable, "-m", "asked_for", "a b", ""],
        env=asked,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    forked = run(["asked_for", "a b", ""], env=asked, timeout=PATIENCE)
    assert own.stdout.splitlines()[-2:] == ["atexit", "finalized"]
    assert forked.stdout == own.stdout.replace("[] False", "[] True")
    assert (forked.returncode, forked.stderr) == (own.returncode, own.stderr) == (7, "error\n")


def test_a_traceback_ends_it(tmp_path: Path) -> None:
    """With the status and the text that Python gives it."""
    code, out, err = ran(tmp_path, "1 / 0")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback")
    assert err.endswith("ZeroDivisionError: division by zero\n")


def test_signals_reach_it_and_its_end_is_told(tmp_path: Path) -> None:
    """As `Popen` tells it: waiting has a bound, and a signal to what has ended is none."""
    (tmp_path / "asked_for.py").write_text("import os, time; os.write(1, b'ready'); time.sleep(60)")
    env = environment({"PYTHONPATH": str(tmp_path)})
    before = open_fds()
    reading, writing = os.pipe()
    program = Program(["asked_for"], stdin=reading, stdout=writing, stderr=2, env=env)
    os.close(writing)
    assert os.read(reading, 100) == b"ready"
    os.close(reading)
    assert program.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.05)
    program.send_signal(signal.SIGTERM)
    assert program.wait(PATIENCE) == program.poll() == -signal.SIGTERM
    program.kill()
    assert not is_alive(program.pid)
    assert open_fds() == before


@pytest.mark.parametrize("name", ["PSYCOPG_IMPL", "PYTHONHASHSEED", "REMAP_SIGTERM"])
def test_what_is_read_at_an_import_is_refused(name: str) -> None:
    """It would be without effect."""
    with pytest.raises(ValueError, match=rf"^{name}: start an interpreter of its own"):
        run(["asked_for"], env=environment({name: "1"}), timeout=PATIENCE)


def test_a_module_in_the_place_of_one_that_was_imported_is_refused(tmp_path: Path) -> None:
    """It would not be found."""
    (tmp_path / "redis.py").write_text("")
    code, _, err = ran(tmp_path, "import redis")
    assert code == 1
    assert "redis was imported from elsewhere: start an interpreter of its own" in err


def test_the_server_ends_with_its_owner() -> None:
    """SIGKILL of the owner, whose forked child still has the socket."""
    code = (
        "import os, time\nfrom tests.support import program\n"
        "program._control()\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(20); os._exit(0)\n"
        "print(program._server[1].pid, child, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, env=environment())
    try:
        assert owner.stdout is not None
        server, child = map(int, owner.stdout.readline().split())
        assert is_alive(server)
    finally:
        owner.kill()
        owner.communicate()
    # It imports before it looks.
    deadline = time.monotonic() + PATIENCE
    while is_alive(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
