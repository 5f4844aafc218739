"""./demo and ./test make their own environment. Here with a stand-in for uv, so that nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# All that the scripts may use besides a shell: what a minimal Debian has.
TOOLS = ["cat", "cksum", "cut", "dirname", "grep", "mkdir", "mv", "rm", "rmdir", "sed", "sh", "sleep", "tr"]

FAKE_UV = """\
#!/bin/sh
[ "$*" != "pip install --help" ] || { echo "--group"; exit; }
echo "$*" >>"$UV_LOG"
case $1 in
    venv)
        sleep 0.5
        "$REAL_PYTHON" -m venv --without-pip "$4"
        ;;
    pip)
        [ ! -e "$UV_LOG.fail" ] || { echo "no route to the index" >&2; exit 7; }
        "$5" -c 'import os, site; open(site.getsitepackages()[0] + "/demo.pth", "w").write(os.getcwd())'
        ;;
esac
"""


class Checkout:
    """A copy of the scripts in a directory of its own, beside a PATH with nothing else on it."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "a check out"
        self.bin = directory / "bin"
        self.log = directory / "uv.log"
        (self.root / "demo_tasks").mkdir(parents=True)
        (self.root / "demo_tasks" / "__main__.py").write_text(
            "import os, sys\n"
            "print('ran', os.path.realpath(sys.prefix), os.getcwd(), *sys.argv[1:])\n"
            "sys.exit(int(os.environ.get('STATUS', 0)))\n"
        )
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        for name in ("demo", "test", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool, path="/usr/bin:/bin")
            assert found is not None, f"no {tool} on this machine"
            (self.bin / tool).symlink_to(found)

    @property
    def stamp(self) -> Path:
        return self.root / ".venv" / ".workerpools"

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.root / "demo"), *arguments],
            env={
                "PATH": str(self.bin),
                "UV_LOG": str(self.log),
                # Its own interpreter, not this environment's: one venv made from another has no packages of its own.
                "REAL_PYTHON": getattr(sys, "_base_executable", sys.executable),
                **environment,
            },
            cwd=self.bin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def calls(self) -> list[str]:
        return [line.split()[0] for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def left_over(self) -> set[str]:
        return {path.name for path in self.root.iterdir()} & {".venv", ".venv.lock"}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def with_uv(checkout: Checkout) -> Checkout:
    checkout.program("uv", FAKE_UV)
    return checkout


def test_runs_the_demo_in_its_own_environment(with_uv: Checkout) -> None:
    """Arguments, working directory and exit status are the demo's; the interpreter is .venv's."""
    done = with_uv.run("--once", "a b", STATUS="3")
    assert done.returncode == 3, done.stderr
    venv = (with_uv.root / ".venv").resolve()
    assert done.stdout == f"ran {venv} {with_uv.bin} --once a b\n"
    assert with_uv.left_over() == {".venv"}


def test_second_start_installs_nothing(with_uv: Checkout) -> None:
    """An environment that is up to date is used as it is, in silence."""
    with_uv.run()
    calls = with_uv.calls()
    done = with_uv.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert with_uv.calls() == calls == ["venv", "pip"]


def test_changed_pyproject_brings_it_up_to_date(with_uv: Checkout) -> None:
    """A changed pyproject.toml is installed again, into the same environment."""
    with_uv.run()
    with (with_uv.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert with_uv.run().returncode == 0
    assert with_uv.calls() == ["venv", "pip", "pip"]


@pytest.mark.parametrize("damage", ["half made", "no interpreter", "moved"])
def test_broken_environment_is_made_anew(with_uv: Checkout, damage: str) -> None:
    """Half an environment, one that cannot run, and one that was made for another path are replaced."""
    with_uv.run()
    if damage == "half made":
        with_uv.stamp.write_text("making\n")
    elif damage == "no interpreter":
        (with_uv.root / ".venv" / "bin" / "python").unlink()
    else:
        with_uv.root = with_uv.root.rename(with_uv.root.with_name("elsewhere"))
    done = with_uv.run()
    assert done.returncode == 0, done.stderr
    assert with_uv.calls() == ["venv", "pip"] * 2


def test_developers_own_environment_is_kept(with_uv: Checkout) -> None:
    """A .venv that works and that these scripts did not make is added to, not removed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", with_uv.root / ".venv"], check=True)
    (with_uv.root / ".venv" / "mine").touch()
    assert with_uv.run().returncode == 0
    assert with_uv.calls() == ["pip"]
    assert (with_uv.root / ".venv" / "mine").exists()


def test_failed_install_leaves_nothing_behind(with_uv: Checkout) -> None:
    """When the installer fails its message is shown, and the next start begins again."""
    fail = Path(f"{with_uv.log}.fail")
    fail.touch()
    done = with_uv.run()
    assert done.returncode != 0
    assert "no route to the index" in done.stderr
    assert with_uv.left_over() == set()
    fail.unlink()
    assert with_uv.run().returncode == 0


def test_failed_update_keeps_what_there_was(with_uv: Checkout) -> None:
    """Without a network a changed pyproject.toml does not cost the environment."""
    with_uv.run()
    before = with_uv.stamp.read_text()
    with (with_uv.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    Path(f"{with_uv.log}.fail").touch()
    assert with_uv.run().returncode != 0
    assert with_uv.stamp.read_text() == before
    assert with_uv.left_over() == {".venv"}


def test_two_starts_at_the_same_moment(with_uv: Checkout) -> None:
    """One makes the environment, the others wait for it and use it."""
    processes = [with_uv.start(str(number)) for number in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.startswith("ran ")
    assert with_uv.calls() == ["venv", "pip"]
    assert with_uv.left_over() == {".venv"}


def test_killed_maker_does_not_block_the_next(with_uv: Checkout) -> None:
    """The lock of a process that is gone is taken over, by one of those who wait."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    lock = with_uv.root / ".venv.lock"
    lock.mkdir()
    # Not only the number counts: this test's own is in use, but by a process that started at another time.
    (lock / "owner").write_text(f"{os.getpid()} 1\n")
    processes = [with_uv.start() for _ in range(3)]
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert with_uv.calls() == ["venv", "pip"]
    assert with_uv.left_over() == {".venv"}


def test_terminated_maker_tidies_up(with_uv: Checkout) -> None:
    """A signal in the middle leaves neither a lock nor half an environment."""
    process = with_uv.start()
    deadline = time.monotonic() + 30
    while "venv" not in with_uv.calls():
        assert time.monotonic() < deadline, "uv was never called"
        time.sleep(0.02)
    # The subshell that makes it, as Ctrl-C would reach it; the script itself ends with the signal it got too.
    owner = int((with_uv.root / ".venv.lock" / "owner").read_text().split()[0])
    os.kill(process.pid, 15)
    os.kill(owner, 15)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert with_uv.left_over() == set()


OLD = "#!/bin/sh\nexit 1\n"
WITHOUT_VENV = '#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\n'


@pytest.mark.parametrize(
    ("python3", "sentence"),
    [
        (None, "Python 3.10 or newer is needed"),
        (OLD, "Python 3.10 or newer is needed"),
        (WITHOUT_VENV, "cannot make virtual environments: apt-get install python3-venv, or install uv."),
    ],
    ids=["no python", "too old", "no venv"],
)
def test_missing_prerequisite_is_one_sentence(checkout: Checkout, python3: str | None, sentence: str) -> None:
    """What is missing is said in one line that names the package, and no half-made directory is left."""
    if python3 is not None:
        checkout.program("python3", python3)
    done = checkout.run()
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr
    assert checkout.left_over() == set()


def test_another_python_is_found_when_the_first_has_no_venv(checkout: Checkout) -> None:
    """The search goes on past a python3 that cannot make environments, and an old uv is not used."""
    checkout.program("uv", "#!/bin/sh\n")
    checkout.program("python3", WITHOUT_VENV)
    checkout.program("python3.12", '#!/bin/sh\ncase "$*" in *"-m venv"*) echo "made by 3.12" >&2; exit 5 ;; esac\n')
    done = checkout.run()
    assert done.returncode != 0
    assert "made by 3.12" in done.stderr
    assert checkout.left_over() == set()


def test_other_environments_do_not_matter(with_uv: Checkout) -> None:
    """Neither an activated environment nor PYTHONPATH nor PYTHONHOME reaches the demo."""
    nowhere = "/nonexistent"
    done = with_uv.run(VIRTUAL_ENV=nowhere, PYTHONPATH=nowhere, PYTHONHOME=nowhere)
    assert done.returncode == 0, done.stderr
