"""What people read never holds a secret."""

from __future__ import annotations

import contextlib
import functools
import string
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import sqlalchemy
from celery import Celery
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workerpools import ConfigurationError, DatabaseTask, WorkerPools
from workerpools._celery.settings import read_settings
from workerpools._text import redact_url
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://api.example.com/v1", "https://api.example.com/v1"),
        ("https://user:secret@api.example.com/v1", "https://user:***@api.example.com/v1"),
        ("postgresql+psycopg2://app:secret@db:5432/shop", "postgresql+psycopg2://app:***@db:5432/shop"),
        ("postgresql://app:se:cr@t@db/shop", "postgresql://app:***@db/shop"),
        ("postgresql://app:secret?x@db/shop?sslpassword=secret", "postgresql://app:***@db/shop"),
        ("postgresql://db/shop?password=secret", "postgresql://db/shop"),
        ("https://api.example.com/?token=secret#secret", "https://api.example.com/"),
        ("redis://:secret@localhost/0", "redis://:***@localhost/0"),
        ("app:secret@db", "app:***@db"),
        # What stands where the user's name does may be a token.
        ("https://secret@api.example.com/v1", "https://***@api.example.com/v1"),
        ("https://secret:@api.example.com/v1", "https://***@api.example.com/v1"),
        ("https://sec@ret:x@api.example.com/v1", "https://***@api.example.com/v1"),
        ("secret@db", "***@db"),
        ("postgresql://app:se@cr/e@t@db/shop", "postgresql://app:***@db/shop"),
        ("", ""),
    ],
)
def test_redact_url(url: str, shown: str) -> None:
    """Passwords, queries and fragments are hidden; the rest is shown."""
    assert redact_url(url) == shown
    assert "secret" not in redact_url(url)


# Of what is not escaped, these do harm: each ends some part of a URL.
PASSWORDS = st.one_of(
    st.text(min_size=1),
    st.text(alphabet=string.ascii_lowercase + "@/:?#[]%&=+ ", min_size=1),
    st.text(alphabet="12@/:?#", min_size=1),
)


@functools.cache
def usual(shown: Callable[[str], str]) -> str:
    """Return what is shown with passwords that nothing is a piece of."""
    return "".join(map(shown, ("x", "x@x", "x@0:x", "x@0/x", "/x", "0/x", ":?x")))


def leaked(password: str, shown: Callable[[str], str]) -> set[str]:
    """Return the pieces of a password that are shown because of it."""
    said, always = shown(password), usual(shown)
    pieces = {password[start : start + 3] for start in range(len(password) - 2)}
    return {piece for piece in pieces if piece in said and piece not in always}


def said_of(declare: Callable[[], Any]) -> str:
    """Return all that is said of an adapter that ``declare`` makes, until it is open."""
    pools = WorkerPools(Celery("redact", set_as_current=False))
    said: list[str] = []
    with contextlib.ExitStack() as stack:
        try:
            unnamed = pools.add(declare())
            resource = pools.add(declare(), name="named")
            said += [repr(unnamed), unnamed.name, repr(resource), resource.adapter.describe(), repr(pools)]
            stack.callback(resource.close, 0)
            resource.get()
        except ConfigurationError as error:
            said.append(str(error))
        except Exception as error:  # the library's own message is its own; the note is ours
            said += getattr(error, "__notes__", [])
    return "\n".join(said)


def shown_of_a_database(password: str) -> str:
    url = f"postgresql+nodriver://u:{password}@localhost/x"
    return said_of(lambda: SQLAlchemyEngine(url))


@settings(max_examples=200, deadline=None)
@given(PASSWORDS)
@example("p@ss")
@example("s3@cr/et")
@example("p@ss:word")
@example("p@host?word")
@example("secret?x@y=z")
@example("p@[word]")
@example("/word")
def test_no_piece_of_a_database_password_is_shown(password: str) -> None:
    """Unescaped, in whatever part of the URL it ends up; the driver does not matter."""
    assert leaked(password, shown_of_a_database) == set()


def shown_of_http(password: str) -> str:
    url = f"https://u:{password}@localhost/x"
    said = said_of(lambda: HttpxClient(base_url=url, verify=False))
    with contextlib.suppress(httpx.InvalidURL):
        parsed = httpx.URL(url)
        said += said_of(lambda: HttpxClient(base_url=parsed, verify=False))
    return said


@settings(max_examples=200, deadline=None)
@given(PASSWORDS)
@example("p@ss/word")
@example("12/word")
@example("p@ss:word/x")
@example("p@host?word")
@example("p@host#word")
@example("/word")
@example(":?xam")
def test_no_piece_of_an_http_password_is_shown(password: str) -> None:
    """As text, and as a URL that httpx has parsed."""
    assert leaked(password, shown_of_http) == set()


def shown_of_settings(password: str) -> str:
    said = []
    for scheme in ("postgresql+nodriver://", "postgres://", "https://", ""):
        for name in ("database_url", "http_base_url", "http_timeout", "database_pool_size"):
            app = Celery("redact", set_as_current=False)
            app.conf[f"workerpools_{name}"] = f"{scheme}u:{password}@localhost/x"
            try:
                read_settings(app.conf, {})
                DatabaseTask.engine.resource_for(app).get()
            except ConfigurationError as error:
                said.append(str(error))
            except Exception as error:
                said += getattr(error, "__notes__", [])
    return "\n".join(said)


@settings(max_examples=25, deadline=None)
@given(PASSWORDS)
@example("p@ss")
def test_no_piece_of_a_password_in_settings_is_shown(password: str) -> None:
    """Whichever setting it was written to."""
    assert leaked(password, shown_of_settings) == set()


@pytest.mark.parametrize("url", ["postgresql://u:p@ss@localhost/x", "postgresql://u:s3@cr/et@localhost/x"])
def test_a_url_that_was_parsed_already_tells_no_password(url: str) -> None:
    """What is in its host or database may have been the password's."""
    with pytest.raises(ConfigurationError, match="escape special characters"):
        SQLAlchemyEngine(url)
    parsed = sqlalchemy.make_url(url)
    said = said_of(lambda: SQLAlchemyEngine(parsed))
    assert "ss@" not in said
    assert "cr/" not in said


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg2://app:x@db:5432/shop?sslmode=require", "postgresql+psycopg2://app@db:5432/shop"),
        ("postgresql+psycopg2://app%40srv:x@db/shop", "postgresql+psycopg2://***"),
        ("postgresql+psycopg2://app@srv:x@db/shop", "postgresql+psycopg2://***"),
        ("sqlite:////home/a@b/shop.db", "sqlite://***"),
        ("sqlite://", "sqlite://"),
    ],
)
def test_what_is_shown_of_a_database(url: str, shown: str) -> None:
    """All but the password and the query, where there is no doubt which is which."""
    assert SQLAlchemyEngine(url).describe() == f"SQLAlchemyEngine {shown}"


@pytest.mark.parametrize(
    "value", [b"postgresql://u:secret@db", sqlalchemy.make_url("postgresql://u:p@secret@db"), ["u:secret@db"]]
)
@pytest.mark.parametrize("name", ["database_url", "http_timeout"])
def test_settings_of_other_types_are_not_shown(name: str, value: Any) -> None:
    """Only their type is."""
    app = Celery("redact", set_as_current=False)
    app.conf[f"workerpools_{name}"] = value
    with pytest.raises(ConfigurationError, match=f"workerpools_{name} is .*{type(value).__name__}") as caught:
        read_settings(app.conf, {})
    assert "secret" not in str(caught.value)
