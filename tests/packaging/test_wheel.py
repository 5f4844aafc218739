"""What is published: the wheel, built from the source distribution as an installer would."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = "https://github.com/workerpools/workerpools"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the source distribution and the wheel that was built from it."""
    directory = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        # Without isolation: nothing is downloaded, hatchling is among the test requirements.
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[PurePosixPath]:
    with zipfile.ZipFile(wheel) as archive:
        return [PurePosixPath(name) for name in archive.namelist()]


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_file_names(built: Path, project: dict[str, Any]) -> None:
    """One pure wheel and one source distribution, under the version of pyproject.toml."""
    version = project["version"]
    assert {path.name for path in built.iterdir()} == {
        f"workerpools-{version}-py3-none-any.whl",
        f"workerpools-{version}.tar.gz",
    }


def test_wheel_holds_the_library_and_nothing_else(names: list[PurePosixPath], project: dict[str, Any]) -> None:
    """And the metadata; no demo, no test, no script, no compiled file."""
    assert {name.parts[0] for name in names} == {
        "workerpools",
        f"workerpools-{project['version']}.dist-info",
    }
    assert [name for name in names if name.suffix in {".pyc", ".so"} or "tests" in name.parts] == []


def test_wheel_holds_every_module(names: list[PurePosixPath]) -> None:
    """No module of the checkout is left out, nor a file of the Pools page; `py.typed` is there, and it says nothing of
    being partial."""
    modules = {
        PurePosixPath(path.relative_to(ROOT))
        for pattern in ("*.py", "*.html", "*.js", "*.css")
        for path in (ROOT / "workerpools").rglob(pattern)
    }
    assert PurePosixPath("workerpools/flower/static/pools.js") in modules
    assert modules <= set(names)
    assert PurePosixPath("workerpools/py.typed") in names
    for name in ("alerts.yml", "dashboard.json"):
        assert PurePosixPath("workerpools/monitoring", name) in names


def test_wheel_holds_the_licence(names: list[PurePosixPath]) -> None:
    """The licence travels with the code."""
    assert [name.name for name in names if "licenses" in name.parts] == ["LICENSE"]


def test_source_distribution_holds_the_tests(built: Path) -> None:
    """Whoever repackages the library can run its tests."""
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {PurePosixPath(*PurePosixPath(name).parts[1:]) for name in tar.getnames()}
    needed = ["pyproject.toml", "docker-compose.yml", "demo", ".ci/environment.sh", "tests/packaging/test_wheel.py"]
    needed += ["docs/conf.py", *(path.name for path in ROOT.glob("*.md"))]
    assert {PurePosixPath(name) for name in needed} <= names
    assert not {".venv", ".git"} & {name.parts[0] for name in names if name.parts}


def test_an_index_takes_both(built: Path) -> None:
    """`twine check`: the metadata are complete, and the description can be rendered."""
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_celery_is_the_only_dependency(metadata: Message) -> None:
    """Installing workerpools installs Celery; every client library is an extra."""
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert required == ["celery>=5.4"]


def test_metadata(metadata: Message, project: dict[str, Any]) -> None:
    """Name, version, Python, licence and extras are what pyproject.toml says, and the README is the description."""
    assert metadata["Name"] == "workerpools"
    assert metadata["Version"] == project["version"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert set(metadata.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])


def test_urls(metadata: Message) -> None:
    """An index links the source, the documentation, the changes and the place for bugs, all of one project."""
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert set(urls) == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert {url for url in urls.values() if not url.startswith(PROJECT)} == set()
    assert urls["Homepage"] == PROJECT
    for name in ("Documentation", "Changelog"):
        assert (ROOT / urls[name].removeprefix(f"{PROJECT}/blob/main/")).is_file()


def test_links_of_the_description_live_on_an_index(metadata: Message) -> None:
    """Each leads to the file that the README's relative link leads to, and the picture to the picture itself."""
    description = str(metadata.get_payload())
    targets = re.findall(r"\]\(([^)\s]+)\)", description)
    written = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text())
    assert len(targets) == len(written) > 30
    for target, relative in zip(targets, written, strict=True):
        if "://" in relative:
            assert target == relative
        elif relative.endswith((".svg", ".png")):
            assert target == f"https://raw.githubusercontent.com/workerpools/workerpools/main/{relative}"
        else:
            assert target == f"{PROJECT}/blob/main/{relative}"
    assert "<!-- python" not in description
    # Nothing else of the README is left out.
    assert "# workerpools\n" in description
    assert "[MIT licence](" in description


EXTRAS = [
    *("httpx", "httpx2", "requests", "sqlalchemy", "psycopg", "asyncpg", "redis"),
    *("django", "fastapi", "flask", "flower", "prometheus", "opentelemetry"),
]


@pytest.mark.parametrize("extra", EXTRAS)
def test_adapters_extras_are_in_all(extra: str, project: dict[str, Any]) -> None:
    """`workerpools[all]` is every adapter and integration."""
    (everything,) = project["optional-dependencies"]["all"]
    assert extra in everything.removeprefix("workerpools[").removesuffix("]").split(",")


def test_image_needs_no_embedded_servers(project: dict[str, Any]) -> None:
    """The group that the Dockerfile installs leaves the embedded servers out, and `demo` adds just those."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    assert "--group demo-app" in (ROOT / "Dockerfile").read_text()
    assert [line for line in groups["demo-app"] if line.startswith(("embedded", "valkey"))] == []
    assert groups["demo"][0] == {"include-group": "demo-app"}
    assert len(groups["demo"]) == 3
    # An index has no use for the demo: it is in no wheel.
    assert [extra for extra in project["optional-dependencies"] if extra.startswith("demo")] == []
