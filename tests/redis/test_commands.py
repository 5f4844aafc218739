"""The tables of commands, beside what a real server says of its commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import redis

from demo_tasks.servers import ValkeyServer
from workerpools.redis._commands import HARMLESS, LEAVING, READS, WRITES, command_of, server_wait

#: Flagged ``write``, but an error does not mean that they did nothing, or nobody's but an operator's.
NOT_WHOLE = {"MIGRATE", "PFDEBUG", "RESTORE-ASKING", "CLUSTER FLUSHSLOT"} | {
    f"FUNCTION {name}" for name in ("DELETE", "FLUSH", "LOAD", "RESTORE")
}


@pytest.fixture(scope="module")
def flags(valkey_server: ValkeyServer) -> dict[str, set[str]]:
    with closing(redis.Redis.from_url(valkey_server.start().url())) as client:
        connection = client.connection_pool.get_connection()
        connection.send_command("COMMAND")
        found = dict(_flagged(connection.read_response()))
        client.connection_pool.release(connection)
    assert len(found) > 300
    return found


def _flagged(entries: Any) -> Iterator[tuple[str, set[str]]]:
    for entry in entries:
        if len(entry) > 9 and entry[9]:
            yield from _flagged(entry[9])
        else:
            yield entry[0].decode().upper().replace("|", " "), {flag.decode() for flag in entry[2]}


def test_reads_are_those_that_the_server_flags(flags: dict[str, set[str]]) -> None:
    """No more, and no fewer."""
    assert {name for name, said in flags.items() if "readonly" in said} == READS & flags.keys()
    assert not [name for name in READS & flags.keys() if "write" in flags[name]]


def test_writes_are_those_that_the_server_flags(flags: dict[str, set[str]]) -> None:
    """Each is an effect; those whose errors prove something are in the table."""
    wanted = {name for name, said in flags.items() if "write" in said}
    assert wanted - NOT_WHOLE == WRITES & flags.keys()
    assert not [name for name in wanted if command_of([name]).harmless]
    assert not [name for name in NOT_WHOLE if command_of([name]).whole]


def test_nothing_harmless_is_flagged_as_a_write(flags: dict[str, set[str]]) -> None:
    """And what an administrator changes is an effect."""
    assert not [name for name in HARMLESS & flags.keys() if "write" in flags[name]]
    changing = {"CONFIG SET", "CLIENT KILL", "SHUTDOWN", "ACL SETUSER", "SCRIPT FLUSH", "PUBLISH", "SPUBLISH", "DEBUG"}
    assert not [name for name in changing if command_of([name]).harmless]


@pytest.mark.parametrize(
    ("arguments", "name", "harmless"),
    [
        (("GET", "a"), "GET", True),
        (("get", "a"), "GET", True),
        ((b"Get", b"a"), "GET", True),
        (("XGROUP CREATE", "a", "b", "$"), "XGROUP CREATE", False),
        (("XGROUP", "create", "a", "b", "$"), "XGROUP CREATE", False),
        (("CONFIG", b"get", "*"), "CONFIG GET", True),
        (("CONFIG", "SET", "a", "b"), "CONFIG SET", False),
        (("CONFIG",), "CONFIG", False),
        (("COMMAND",), "COMMAND", True),
        (("CLIENT REPLY", "OFF"), "CLIENT REPLY", True),
        (("OBJECT", "ENCODING", "a"), "OBJECT ENCODING", True),
        (("EVAL", "return 1", 0), "EVAL", False),
        (("EVAL_RO", "return 1", 0), "EVAL_RO", True),
        (("FCALL", "f", 0), "FCALL", False),
        (("PUBLISH", "a", "b"), "PUBLISH", False),
        (("JSON.GET", "a"), "JSON.GET", False),
        (("", "a"), "a command", False),
        (("s3cret: in place of a name", "a"), "a command", False),
        ((), "a command", False),
    ],
)
def test_a_command_is_known_by_its_name(arguments: tuple[Any, ...], name: str, harmless: bool) -> None:
    """However it is written; what is unknown is an effect."""
    found = command_of(arguments)
    assert (found.name, found.harmless) == (name, harmless)


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        (("GET", "a"), 0.0),
        (("BLPOP", "a", "b", 2), 2.0),
        (("BLPOP", "a", b"0.5"), 0.5),
        (("BLPOP", "a", 0), None),
        (("BLMOVE", "a", "b", "LEFT", "RIGHT", 3), 3.0),
        (("BLMPOP", 4, 1, "a", "LEFT"), 4.0),
        (("XREAD", "BLOCK", 1500, "STREAMS", "a", "$"), 1.5),
        (("XREAD", "COUNT", 1, b"block", 0, "STREAMS", "a", "$"), None),
        (("XREAD", "STREAMS", "block", "5"), 0.0),
        (("XREADGROUP", "GROUP", "g", "c", "BLOCK", 250, "STREAMS", "a", ">"), 0.25),
        (("WAIT", 1, 100), 0.1),
        (("BLPOP", "a", "no number"), 0.0),
    ],
)
def test_how_long_a_command_waits_on_the_server(arguments: tuple[Any, ...], seconds: float | None) -> None:
    """By its own arguments; None for ever."""
    assert server_wait(command_of(arguments), arguments) == seconds


def test_what_stays_on_a_connection_is_flagged_by_no_server() -> None:
    """A list of ours; a misspelled name would never be met."""
    assert not [name for name in LEAVING if not command_of(name.split()).leaves]
