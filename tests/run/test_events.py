"""One line for each event, with fields, and without secrets."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workerpools._run.events import Event, EventKind, Listeners, write
from workerpools._text import redact_text


def test_a_line_and_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    """The line begins with the event; the record has each field under a name of its own."""
    with caplog.at_level(logging.DEBUG, "workerpools"):
        Listeners().emit(EventKind.TASK_RETRIED, "db", task="shop.pay", kind="stale", delay=1.5)
        Listeners().emit(EventKind.VALUE_DISCARDED, "db", "inherited by a fork", connections=2)
        Listeners().emit(EventKind.CONNECTION_LEAKED, "db", at="shop.py:1 in pay", stack="Acquired at:\n  x")
    retried, discarded, leaked = caplog.records
    pid = retried.process
    assert retried.getMessage() == f"task_retried resource=db pid={pid} task=shop.pay kind=stale delay=1.5"
    assert (retried.name, retried.levelname) == ("workerpools.replay", "WARNING")
    fields = {key: value for key, value in vars(retried).items() if key.startswith("workerpools_")}
    assert json.loads(json.dumps(fields)) == {
        "workerpools_event": "task_retried",
        "workerpools_resource": "db",
        "workerpools_pid": pid,
        "workerpools_task": "shop.pay",
        "workerpools_kind": "stale",
        "workerpools_delay": 1.5,
    }
    assert discarded.getMessage() == f"value_discarded resource=db pid={pid} connections=2 inherited by a fork"
    assert (discarded.name, discarded.levelname) == ("workerpools.connections", "INFO")
    assert (leaked.name, leaked.stack_info) == ("workerpools.leaks", "Acquired at:\n  x")
    assert "Acquired" not in leaked.getMessage()
    # What groups lines groups those of an event.
    assert retried.msg == "task_retried resource=%s pid=%s task=%s kind=%s delay=%s"


def test_a_listener_gets_the_same() -> None:
    """As words and as fields; one event is equal to another one that tells the same."""
    found: list[Event] = []
    listeners = Listeners()
    listeners.add(found.append)
    listeners.emit(EventKind.REPLAY_REFUSED, "db", reason="the task is not idempotent")
    listeners.emit(EventKind.CONNECTION_HELD, "db", task="t", stack="s")
    assert found[0].detail == "reason=the task is not idempotent"
    assert dict(found[0].fields) == {"reason": "the task is not idempotent"}
    assert (found[1].detail, found[1].fields["stack"]) == ("task=t", "s")
    assert len({*found}) == 2


def test_each_part_can_be_silenced(caplog: pytest.LogCaptureFixture) -> None:
    """By its logger."""
    with caplog.at_level(logging.DEBUG, "workerpools"), caplog.at_level(logging.WARNING, "workerpools.connections"):
        Listeners().emit(EventKind.VALUE_OPENED, "db")
        Listeners().emit(EventKind.ATTEMPT_REPLAYED, "db")
    assert [record.name for record in caplog.records] == ["workerpools.replay"]


PASSWORDS = st.text(st.characters(min_codepoint=33, max_codepoint=0x24F, categories=("L", "N", "P", "S")), min_size=1)


@given(
    st.sampled_from(["postgresql+psycopg2", "https", "redis", "a.b-c"]),
    st.text(st.characters(categories=("L",), max_codepoint=127), max_size=5),
    PASSWORDS,
    st.sampled_from(["", "it failed: ", "(", "x://y "]),
)
def test_no_password_of_a_url_in_any_line(scheme: str, user: str, password: str, before: str) -> None:
    """Wherever the URL stands, and whatever the password holds, an "@" and a "/" included."""
    secret = f"-{password}-secret-"
    url = f"{before}{scheme}://{user}:{secret}@db.example.com/shop and more"
    assert secret not in redact_text(url)
    assert redact_text(url).endswith("@db.example.com/shop and more")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("workerpools.secrets")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        write("workerpools.secrets", logging.ERROR, "event", {"url": url, "n": 1}, text=url, stack=f"at\n{url}")
    finally:
        logger.removeHandler(handler)
    (record,) = records
    assert secret not in logging.Formatter("%(message)s").format(record)
    assert secret not in repr(vars(record))


@pytest.mark.parametrize("text", ["", "a@b", "x://y", "no URL at all", "mail me@there, see https://here"])
def test_what_holds_no_secret_stays(text: str) -> None:
    """A line is not made unreadable."""
    assert redact_text(text) == text
