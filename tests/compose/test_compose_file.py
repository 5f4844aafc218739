"""What can be said of docker-compose.yml and the Dockerfile without a container engine.

That the services' commands really run, with exactly this environment, is tested beside this file against the
embedded servers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.compose import compose_file

# What the README has one write to .env.
SHELL = {"FLOWER_BASIC_AUTH": "someone:a-password"}
SERVICES = compose_file.services(SHELL)
OURS = {"upstream", "worker", "flower", "submit"}
# What the demo's application reads; libpq itself reads PGPASSWORD.
APPLICATION = {"REDIS_URL", "DATABASE_URL", "UPSTREAM_URL", "PGPASSWORD"}
RUNS_APPLICATION = {"worker", "flower", "submit"}

every_service = pytest.mark.parametrize("name", sorted(SERVICES))
long_running = pytest.mark.parametrize("name", sorted(set(SERVICES) - {"submit"}))


def arguments(name: str) -> list[str]:
    """A service's command, which is always a list: a string would be split by rules of its own."""
    command = SERVICES[name]["command"]
    assert isinstance(command, list)
    assert all(isinstance(argument, str) for argument in command)
    return command


def test_valid_against_the_compose_specification() -> None:
    """The file follows the specification's schema, unknown keys refused."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            "vendor.compose-spec",
            str(compose_file.PATH),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_services() -> None:
    """The services are those that the README and the demo speak of."""
    assert set(SERVICES) == OURS | {"redis", "postgres"}


@every_service
def test_image_is_pinned(name: str) -> None:
    """Every image has a tag that says which one it is: none moves under an unchanged file."""
    service = SERVICES[name]
    image, _, tag = service["image"].partition(":")
    assert image
    if name in OURS:
        assert service["build"] == "."
        assert tag == "local"
    else:
        assert re.fullmatch(r"\d+(\.\d+)*-alpine", tag), f"{image} has the tag {tag!r}"


@every_service
def test_does_not_run_as_root(name: str) -> None:
    """Every service names a user, and none of them is root."""
    user = SERVICES[name]["user"].partition(":")[0]
    assert user not in {"", "0", "root"}
    assert not SERVICES[name].get("privileged")


@long_running
def test_health_check(name: str) -> None:
    """Health checks are argument lists without a space in them: some engines split arguments at spaces."""
    check = SERVICES[name]["healthcheck"]
    kind, *command = check["test"]
    assert kind == "CMD"
    assert command
    assert all(isinstance(argument, str) and argument for argument in command)
    assert [argument for argument in command if re.search(r"\s", argument)] == []
    assert compose_file.seconds(check["timeout"]) <= compose_file.seconds(check["interval"])
    assert check["retries"] >= 1


def test_health_check_code_compiles() -> None:
    """Code given to `python -c` is an expression that Python can read."""
    checked = 0
    for service in SERVICES.values():
        command = service.get("healthcheck", {}).get("test", [])
        if command[1:3] == ["python", "-c"]:
            compile(command[3], "<health check>", "eval")
            checked += 1
    assert checked == 3


def test_worker_health_check_asks_this_worker() -> None:
    """Its main process, on the port that its environment has it serve, which is open to nobody else."""
    worker = SERVICES["worker"]
    port = worker["environment"]["WORKERPOOLS_METRICS_PORT"]
    assert f"http://127.0.0.1:{port}/readyz" in worker["healthcheck"]["test"][-1]
    assert "WORKERPOOLS_METRICS_HOST" not in worker["environment"]
    # Flower and the submitter have no such port.
    assert "WORKERPOOLS_METRICS_PORT" not in SERVICES["flower"]["environment"]


@every_service
def test_dependencies_are_waited_for(name: str) -> None:
    """Whatever a service depends on exists, has a health check, and is waited for until it is healthy."""
    for other, how in SERVICES[name].get("depends_on", {}).items():
        assert how == {"condition": "service_healthy"}
        assert "healthcheck" in SERVICES[other]


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("worker", {"redis", "postgres", "upstream"}),
        ("flower", {"redis", "worker"}),
        ("submit", {"redis", "postgres", "worker"}),
    ],
)
def test_depends_on_what_it_connects_to(name: str, others: set[str]) -> None:
    """No service starts before the servers that it needs at once."""
    assert set(SERVICES[name]["depends_on"]) == others


@pytest.mark.parametrize("name", sorted(RUNS_APPLICATION))
def test_application_environment(name: str) -> None:
    """Whoever imports demo_tasks.app has every variable that it reads."""
    environment = SERVICES[name]["environment"]
    assert set(environment) >= APPLICATION
    assert all(environment[variable] for variable in APPLICATION)


def test_urls_point_to_services() -> None:
    """Every URL of the environment names a service on a network that both are in, and the port it listens on."""
    environment = SERVICES["worker"]["environment"]
    targets = {variable: urlsplit(environment[variable]) for variable in ("REDIS_URL", "DATABASE_URL", "UPSTREAM_URL")}
    assert {variable: (url.scheme, url.hostname, url.port) for variable, url in targets.items()} == {
        "REDIS_URL": ("redis", "redis", 6379),
        "DATABASE_URL": ("postgresql+psycopg2", "postgres", 5432),
        "UPSTREAM_URL": ("http", "upstream", 8080),
    }
    for url in targets.values():
        assert url.hostname is not None
        for name in RUNS_APPLICATION:
            assert set(SERVICES[url.hostname]["networks"]) & set(SERVICES[name]["networks"])

    database = targets["DATABASE_URL"]
    postgres = SERVICES["postgres"]["environment"]
    assert database.username == postgres["POSTGRES_USER"]
    assert database.path == "/" + postgres["POSTGRES_DB"]
    assert environment["PGPASSWORD"] == postgres["POSTGRES_PASSWORD"]
    bind = arguments("upstream")[arguments("upstream").index("--bind") + 1]
    assert bind == f"0.0.0.0:{targets['UPSTREAM_URL'].port}"


def test_commands() -> None:
    """The application's services run what the documentation says they run."""
    assert arguments("worker") == [
        *("celery", "-A", "demo_tasks.app", "worker"),
        *("--pool", "prefork", "--concurrency", "4", "-E", "--loglevel", "INFO"),
    ]
    assert arguments("flower") == [
        *("celery", "-A", "demo_tasks.app", "flower"),
        *("--conf=/app/demo_tasks/flowerconfig.py", "--address=0.0.0.0", "--port=5555"),
    ]
    assert arguments("submit") == ["python", "-m", "demo_tasks.submit"]
    assert arguments("upstream")[0] == "gunicorn"
    assert arguments("upstream")[-1] == "httpbin:app"


@every_service
def test_stop_grace_period(name: str) -> None:
    """Every service says how long it may take to stop, and the worker's is longer than its drain."""
    grace = compose_file.seconds(SERVICES[name]["stop_grace_period"])
    assert grace >= {"worker": 60, "upstream": 31}.get(name, 5)


def test_flower_asks_for_a_password(tmp_path: Path) -> None:
    """It gets user and password from the environment alone, and does not start without; every command of Compose works
    in a shell that does not have them."""
    assert SERVICES["flower"]["environment"]["FLOWER_BASIC_AUTH"] == SHELL["FLOWER_BASIC_AUTH"]
    assert "FLOWER_UNAUTHENTICATED_API" not in SERVICES["flower"]["environment"]
    for shell in ({}, {"FLOWER_BASIC_AUTH": ""}):
        without = compose_file.services(shell)["flower"]["environment"]
        assert without["FLOWER_BASIC_AUTH"] == ""
        command = [sys.executable, "-m", *arguments("flower")]
        config = compose_file.ROOT / "demo_tasks" / "flowerconfig.py"
        done = subprocess.run(
            [each if not each.startswith("--conf=") else f"--conf={config}" for each in command],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(compose_file.ROOT), **without},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode != 0
        assert "FLOWER_BASIC_AUTH=me:secret" in done.stderr
        assert "Visit me" not in done.stderr


def test_only_flower_is_published_and_only_here() -> None:
    """One port is published, on the loopback interface; broker and database are on an internal network alone."""
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"flower": ["127.0.0.1:5555:5555"]}
    assert compose_file.services({**SHELL, "FLOWER_PORT": "8888"})["flower"]["ports"] == ["127.0.0.1:8888:5555"]
    networks = compose_file.load(SHELL)["networks"]
    assert networks["internal"] == {"internal": True}
    for name, service in SERVICES.items():
        assert service["networks"] == (["internal", "published"] if name == "flower" else ["internal"])


def test_no_secret_in_a_command() -> None:
    """No password is an argument, where every process list would show it, or part of a URL, where a log would."""
    passwords = {"POSTGRES_PASSWORD": "pw-of-postgres", "FLOWER_BASIC_AUTH": "someone:pw-of-flower"}
    for name, service in compose_file.services(passwords).items():
        shown: list[Any] = [service.get("command", []), service.get("healthcheck", {})]
        shown += [value for key, value in service.get("environment", {}).items() if key.endswith("_URL")]
        assert "pw-of-" not in repr(shown), name


DOCKERFILE = (compose_file.ROOT / "Dockerfile").read_text()


def test_image_user_is_the_services_user() -> None:
    """The image runs as the user that the services name, by number: an engine can tell that it is not root."""
    users = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert users == ["10001:10001"]
    assert {SERVICES[name]["user"] for name in OURS} == set(users)


def test_image_is_built_in_two_stages_on_one_base() -> None:
    """What builds is not what runs, and both have the same Python: the environment is copied from one to the other."""
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert bases == ["python:3.13-slim", "python:3.13-slim"]
    last_stage = DOCKERFILE.rpartition("\nFROM ")[2]
    assert "pip install" not in last_stage
    assert "apt-get" not in last_stage


def test_image_runs_the_worker_by_default() -> None:
    """`docker run` without a command is the worker of the compose file."""
    command = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert len(command) == 1
    assert re.findall(r'"([^"]*)"', command[0]) == arguments("worker")


def test_files_the_image_copies_exist() -> None:
    """Every source of a COPY is in the checkout and is let through by .dockerignore."""
    allowed = {
        line[1:] for line in (compose_file.ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert set(sources) == allowed
    for source in sources:
        assert (compose_file.ROOT / source).exists(), source


def test_image_has_flowers_configuration() -> None:
    """What the command of Flower names is in the image, and every user may read it: it is that of the checkout."""
    (path,) = [each.partition("=")[2] for each in arguments("flower") if each.startswith("--conf=")]
    (source, target) = re.search(r"^COPY --from=build /src/(\S+) (\S+)$", DOCKERFILE, re.MULTILINE).groups()
    assert path.startswith(f"{target}/")
    assert (compose_file.ROOT / source / path.removeprefix(f"{target}/")).is_file()


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("plain", {}, "plain"),
        ("${A}", {"A": "1"}, "1"),
        ("${A}", {}, ""),
        ("${A:-b:c}", {}, "b:c"),
        ("${A:-b}", {"A": ""}, "b"),
        ("x${A:-b}y${A:?no}", {"A": "1"}, "x1y1"),
        ("$$A", {"A": "1"}, "$A"),
    ],
)
def test_interpolation(text: str, environment: dict[str, str], expected: str) -> None:
    """Variables are filled in as the compose specification says."""
    assert compose_file.interpolate(text, environment) == expected


@pytest.mark.parametrize("text", ["$A", "${A", "${A+b}", "$"])
def test_interpolation_refuses_what_it_does_not_know(text: str) -> None:
    """A form that this helper does not fill in is an error, not a silent difference from Compose."""
    with pytest.raises(ValueError, match="cannot interpolate"):
        compose_file.interpolate(text, {"A": "1"})


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("1m30s", 90), ("500ms", 0.5), ("1h", 3600)])
def test_durations(text: str, expected: float) -> None:
    """Durations are read as the compose specification writes them."""
    assert compose_file.seconds(text) == pytest.approx(expected)
