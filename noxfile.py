"""The developers' tasks: `nox -l` lists them, `nox -s lint` runs one, `nox -s tests -- -k fork` passes arguments on.

Plain `nox` runs the linters, the type checkers, the import contracts and the tests on the interpreter at hand.
"""

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "types", "imports", "docs", "tests-current"]

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
CELERY = ["5.4", "5.5", "5.6", "5.7"]
SQLALCHEMY = ["2.0", "2.1"]
#: Besides the newest: those that Django supports for long, and the one before the newest. Python 3.12 has them all.
DJANGO = ["4.2", "5.2", "6.0"]
#: Interpreters for the lowest and for the newest of every dependency.
VERSIONS = [("3.10", "lowest-direct"), ("3.13", "highest"), ("3.14", "highest")]
SHOW_VERSIONS = (
    "from importlib.metadata import version; "
    "print(*(f'{name} {version(name)}' for name in ('celery', 'billiard', 'sqlalchemy', 'django', 'redis', 'httpx')))"
)
PYPROJECT = nox.project.load_toml("pyproject.toml")


def group(name: str) -> list[str]:
    """The requirements of one dependency group: not every installer understands `--group`."""
    return nox.project.dependency_groups(PYPROJECT, name)


@nox.session
def lint(session: nox.Session) -> None:
    """Code style."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python=["3.10", "3.13"])
def types(session: nox.Session) -> None:
    """The type checkers, on both ends of what SQLAlchemy 2.0 and 2.1 cover."""
    session.install("-e", ".[all]", *group("types"), *group("test"))
    session.run("mypy")
    session.run("pyright", "--pythonpath", f"{session.bin}/python")


@nox.session
def imports(session: nox.Session) -> None:
    """The import contracts."""
    session.install("-e", ".", *group("lint"))
    session.run("lint-imports", "--no-cache")


@nox.session
def docs(session: nox.Session) -> None:
    """The site of the documentation, in `site/`: warnings are errors. Then its code blocks are executed."""
    session.install("-e", ".[all]", *group("test"))
    session.run("sphinx-build", "-q", "-W", "--keep-going", "-c", "docs", ".", "site")
    session.run("pytest", "tests/docs", *session.posargs)


@nox.session
def httpx2(session: nox.Session) -> None:
    """The tests of httpx on httpx2, which needs Python 3.11."""
    session.install("-e", ".[all]", *group("test"))
    session.run("python", "-m", "pytest", "-n", "4", "-p", "tests.support.on_httpx2", "tests/httpx", *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """The benchmarks, about half an hour: `nox -s benchmarks -- overhead`."""
    session.install("-e", ".[all]", *group("test"), *group("benchmarks"))
    session.run("python", "-m", "benchmarks", *session.posargs)


def run_tests(session: nox.Session, *pins: str) -> None:
    session.install("-e", ".[all]", *group("test"), *pins)
    # A resolver that cannot have the newest release falls back to an older one in silence: say what it took.
    session.run("python", "-c", SHOW_VERSIONS)
    session.run("pytest", "-n", "4", "--dist", "worksteal", *session.posargs)


@nox.session
@nox.parametrize("sqlalchemy", ["==2.0.5.post1", ">=2.1"])
def compared(session: nox.Session, sqlalchemy: str) -> None:
    """The uses of a plain engine and of ours, on the lowest and the newest SQLAlchemy; 2.1 needs Python 3.11."""
    session.install("-e", ".[all]", *group("test"), f"sqlalchemy{sqlalchemy}")
    session.run("python", "-c", SHOW_VERSIONS)
    tests = session.posargs or ["tests/sqlalchemy/test_same_as_plain.py"]
    session.run("pytest", "-n", "2", *tests)


@nox.session(python="3.12")
@nox.parametrize("release", DJANGO)
def django(session: nox.Session, release: str) -> None:
    """Django's tests, on the releases of Django that a project may have."""
    session.install("-e", ".[all]", *group("test"), f"django~={release}.0")
    session.run("python", "-c", SHOW_VERSIONS)
    session.run("pytest", "-n", "2", *(session.posargs or ["tests/django"]))


#: What meets every library in less than a minute: the adapters' contracts, what follows which exception, Celery's
#: settings and requests, and Django's own test runner.
QUICK = [
    *("tests/celery", "tests/django/test_project.py", "tests/run/test_classify.py", "tests/httpx/test_contract.py"),
    *("tests/requests/test_contract.py", "tests/redis/test_contract.py", "tests/sqlalchemy/test_contract.py"),
]


@nox.session(venv_backend="uv")
@nox.parametrize(("python", "resolution"), VERSIONS)
def versions(session: nox.Session, resolution: str) -> None:
    """A quick part of the tests, on the lowest and the newest of every dependency; CI runs it."""
    session.install("-e", ".[all]", *group("test"), "--resolution", resolution)
    session.run("python", "-c", SHOW_VERSIONS)
    tests = session.posargs or ["-m", "not worker and not slow and not soak", *QUICK]
    session.run("python", "-m", "pytest", "-q", "-n", "2", *tests)


@nox.session(name="tests-current")
def tests_current(session: nox.Session) -> None:
    """The tests, on the interpreter at hand and the newest releases."""
    run_tests(session)


@nox.session
@nox.parametrize(
    ("python", "celery", "sqlalchemy"),
    [
        (python, celery, sqlalchemy)
        for python in PYTHONS
        for celery in CELERY
        for sqlalchemy in SQLALCHEMY
        # SQLAlchemy 2.1 needs Python 3.11; Celery before 5.6 does not know Python 3.14.
        if (python, sqlalchemy) != ("3.10", "2.1") and (python, celery) not in [("3.14", "5.4"), ("3.14", "5.5")]
    ],
)
def tests(session: nox.Session, celery: str, sqlalchemy: str) -> None:
    """The tests, on every version that is promised."""
    # It refuses Celery 5.7.
    batches = ["celery-batches>=0.11"] if celery != "5.7" else []
    run_tests(session, f"celery~={celery}.0", f"sqlalchemy~={sqlalchemy}.0", *batches)
