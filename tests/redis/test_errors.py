"""What a server's error says: the table, from what the drivers make of the server's own words."""

from __future__ import annotations

import ssl
from importlib import import_module
from typing import Any

import pytest

from workerpools import FailureKind, classify
from workerpools.redis._errors import answered, classify_connecting, code_of

STALE, UNAVAILABLE, PERMANENT = FailureKind.STALE, FailureKind.UNAVAILABLE, FailureKind.PERMANENT
INDETERMINATE = FailureKind.INDETERMINATE

#: A server's line; its code; the kind for a plain command and for a script; whether a script did nothing, too.
TABLE: list[tuple[str, str, FailureKind | None, FailureKind | None, bool]] = [
    ("WRONGTYPE Operation against a key holding the wrong kind of value", "WRONGTYPE", None, None, False),
    ("ERR value is not an integer or out of range", "ERR", None, None, False),
    ("ERR unknown command 'FOO', with args beginning with: ", "ERR", None, None, False),
    ("NOSCRIPT No matching script. Please use EVAL.", "NOSCRIPT", None, None, True),
    ("NOGROUP No such key 'a' or consumer group 'b'", "NOGROUP", None, None, False),
    ("EXECABORT Transaction discarded because of previous errors.", "EXECABORT", None, None, True),
    ("READONLY You can't write against a read only replica.", "READONLY", STALE, INDETERMINATE, False),
    ("UNBLOCKED force unblock from blocking operation", "UNBLOCKED", STALE, INDETERMINATE, False),
    ("LOADING Valkey is loading the dataset in memory", "LOADING", UNAVAILABLE, UNAVAILABLE, True),
    ("BUSY Valkey is busy running a script.", "BUSY", UNAVAILABLE, UNAVAILABLE, True),
    ("MASTERDOWN Link with MASTER is down", "MASTERDOWN", UNAVAILABLE, INDETERMINATE, False),
    ("CLUSTERDOWN The cluster is down", "CLUSTERDOWN", UNAVAILABLE, INDETERMINATE, False),
    ("MISCONF Errors writing to the AOF file", "MISCONF", UNAVAILABLE, INDETERMINATE, False),
    ("NOREPLICAS Not enough good replicas to write.", "NOREPLICAS", UNAVAILABLE, INDETERMINATE, False),
    ("OOM command not allowed when used memory > 'maxmemory'.", "OOM", UNAVAILABLE, INDETERMINATE, False),
    ("ERR max number of clients reached", "ERR", UNAVAILABLE, UNAVAILABLE, True),
    ("NOAUTH Authentication required.", "NOAUTH", PERMANENT, PERMANENT, True),
    ("NOPERM User a has no permissions to run the 'get' command", "NOPERM", PERMANENT, INDETERMINATE, False),
    ("MOVED 3999 127.0.0.1:6381", "MOVED", PERMANENT, INDETERMINATE, False),
    ("CROSSSLOT Keys in request don't hash to the same slot", "CROSSSLOT", PERMANENT, INDETERMINATE, False),
]


def parsed(library: str, line: str) -> Any:
    """What a driver makes of a server's line."""
    return import_module(f"{library}._parsers")._RESP2Parser.parse_error(line)


@pytest.mark.parametrize("library", ["redis", "valkey"])
@pytest.mark.parametrize(("line", "code", "plain", "script", "nothing"), TABLE)
def test_an_answer_says_what_was_done(
    library: str, line: str, code: str, plain: FailureKind | None, script: FailureKind | None, nothing: bool
) -> None:
    """A plain command has done nothing; a script has not where the server refused the script itself."""
    error = parsed(library, line)
    found = code_of(error)
    # valkey-py does not tell why the server wants other credentials: both reasons are permanent.
    assert found == code or (found, code) == ("WRONGPASS", "NOAUTH")
    command = answered(code, str(error), whole=True, reused=True)
    assert (command.nothing, command.kind, bool(command.known)) == (True, plain, plain is not None)
    within = answered(code, str(error), whole=False, reused=True)
    assert (within.nothing, within.kind) == (nothing, script)


def test_a_new_connection_to_a_replica_is_not_stale() -> None:
    """The next one would lead there, too: the task comes back later."""
    assert answered("READONLY", "", whole=True, reused=False).kind is UNAVAILABLE


@pytest.mark.parametrize("library", ["redis", "valkey"])
def test_what_no_server_said_has_no_code(library: str) -> None:
    """Lost connections, mistakes in the arguments, other errors."""
    module = import_module(library)
    for error in (module.ConnectionError("Connection closed by server."), module.TimeoutError("x"), module.DataError()):
        assert code_of(error) == ""
    assert code_of(module.WatchError("Watched variable changed.")) == ""
    assert code_of(ValueError("ERR no")) == ""


@pytest.mark.parametrize("library", ["redis", "valkey"])
def test_connecting(library: str) -> None:
    """Nothing was sent; what a log-in is answered with, it is always answered with."""
    module = import_module(library)
    refused = module.ConnectionError("Error 111 connecting to localhost:1. Connection refused.")
    untrusted = module.ConnectionError("Error 1 connecting")
    untrusted.__context__ = ssl.SSLCertVerificationError("no")
    for error, kind in (
        (refused, UNAVAILABLE),
        (untrusted, PERMANENT),
        (parsed(library, "WRONGPASS invalid username-password pair or user is disabled."), PERMANENT),
        (parsed(library, "ERR DB index is out of range"), PERMANENT),
        (parsed(library, "ERR max number of clients reached"), UNAVAILABLE),
        (parsed(library, "LOADING Valkey is loading the dataset in memory"), UNAVAILABLE),
    ):
        assert classify_connecting(error, timed_out=False).kind is kind, error


@pytest.mark.parametrize("library", ["redis", "valkey"])
def test_a_client_that_nobody_watches_proves_little(library: str) -> None:
    """`workerpools.classify` says no more than the exception does."""
    module = import_module(library)
    for error, kind in (
        (module.ConnectionError("Connection closed by server."), INDETERMINATE),
        (module.TimeoutError("Timeout reading from socket"), INDETERMINATE),
        (parsed(library, "LOADING x"), UNAVAILABLE),
        (parsed(library, "OOM x"), INDETERMINATE),
    ):
        failure = classify(error)
        assert failure is not None
        assert failure.kind is kind, error
    assert classify(parsed(library, "WRONGTYPE x")) is None
    assert classify(module.DataError()) is None
