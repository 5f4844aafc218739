"""The project's own tests, run as Django runs them; and decisions that need no server."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.databases import Database
from tests.support.paths import ROOT, environment
from workerpools.django._errors import may_end


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_its_own_tests(driver: str, database: Database) -> None:
    """Eager tasks, views and forks in Django's own test runner."""
    own = {
        "HOST": database.host,
        "PORT": database.port,
        "NAME": database.name,
        "USER": database.user,
        "PASSWORD": database.password,
        "OPTIONS": {"application_name": "project default"},
        "TEST": {"NAME": f"{database.name}_tests"},
    }
    env = {
        "DJANGO_SETTINGS_MODULE": "tests.django.project.settings",
        "PROJECT_BROKER": "memory://",
        "PROJECT_DATABASE": json.dumps(own),
        "PROJECT_DRIVER": driver,
    }
    done = subprocess.run(
        [sys.executable, "-m", "django", "test", "tests.django.project.shop", "--noinput"],
        cwd=ROOT,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ran 9 tests" in done.stderr


@pytest.mark.parametrize(
    ("statement", "may"),
    [
        ("SELECT 1", False),
        ("SELECT CASE WHEN a THEN 1 END FROM b;", False),
        ("(SELECT 1) UNION (SELECT 2)", False),
        ("-- COMMIT\nSELECT 1", False),
        ("/* a */ /* b */ INSERT INTO a VALUES (%s)", False),
        ('SAVEPOINT "s1"', False),
        ('ROLLBACK TO SAVEPOINT "s1"', False),
        ("rollback work to s1", False),
        ("COMMIT", True),
        ("  /* here */ commit and chain", True),
        ("-- a\nEND", True),
        ("ROLLBACK", True),
        ("ABORT", True),
        ("PREPARE TRANSACTION 'a'", True),
        ("SELECT 1; COMMIT; BEGIN", True),
        # What is not plainly another statement may.
        ("/* /* nested */ */ SELECT 1", True),
        ("SELECT ';'", True),
        (b"SELECT 1", True),
        (None, True),
        ("", True),
    ],
)
def test_a_statement_that_may_end_its_transaction(statement: object, may: bool) -> None:
    assert may_end(statement) is may
