"""What a server's error says: what was done, and what kind of failure it is. Pure functions.

The server's answer is a proof where it means that a command was refused before it ran. In scripts and unknown commands
most errors are no proof: an error of one of their own commands looks the same.
"""

from __future__ import annotations

import ssl
from typing import NamedTuple

from workerpools.adapter import Failure, FailureKind, Phase, Sent, causes

__all__ = ["Answer", "answered", "classify_connecting", "classify_unwatched", "code_of"]

#: The codes that drivers replace by a class of their own, and take from the message.
_OF_CLASS = {
    "AuthenticationWrongNumberOfArgsError": "ERR",
    "AskError": "ASK",
    "BusyLoadingError": "LOADING",
    "ClusterCrossSlotError": "CROSSSLOT",
    "ClusterDownError": "CLUSTERDOWN",
    "ExecAbortError": "EXECABORT",
    "MasterDownError": "MASTERDOWN",
    "ModuleError": "ERR",
    "MovedError": "MOVED",
    "NoPermissionError": "NOPERM",
    "NoScriptError": "NOSCRIPT",
    "OutOfMemoryError": "OOM",
    "ReadOnlyError": "READONLY",
    "TryAgainError": "TRYAGAIN",
}

#: The message of an error without a class of its own, at whose end a server closes the connection.
_TOO_MANY = "max number of clients reached"

_UNAVAILABLE = {
    "BUSY": "the server is busy with a script",
    "CLUSTERDOWN": "the cluster is down",
    "LOADING": "the server is loading its data",
    "MASTERDOWN": "the replica has lost its primary",
    "MISCONF": "the server cannot save its data, and refuses to write",
    "NOREPLICAS": "the primary has too few replicas, and refuses to write",
    "OOM": "the server's memory is full",
    "TRYAGAIN": "the cluster is moving the keys",
}

_CLUSTER = "the server belongs to a cluster; RedisClient is for one primary"

_PERMANENT = {
    "ASK": _CLUSTER,
    "CROSSSLOT": _CLUSTER,
    "DENIED": "the server takes no connections from here",
    "MOVED": _CLUSTER,
    "NOAUTH": "the server wants a password",
    "NOPERM": "the user has no permission",
    "WRONGPASS": "the user or the password was rejected",
}

#: Another server is the primary now.
_FAILED_OVER = {
    "READONLY": "the server is a replica now",
    "UNBLOCKED": "the server became a replica while the command waited",
}

#: No command inside of a script gets one of these: the server refused the script itself.
_BEFORE_SCRIPTS = frozenset(("BUSY", "LOADING", "NOAUTH", "NOSCRIPT", "EXECABORT"))


class Answer(NamedTuple):
    """What an error as the answer to a command says.

    Attributes:
        nothing: Whether the command did nothing.
        kind: The kind of failure; None where it is none of the connection or the server's state.
        known: A short sentence.
    """

    nothing: bool
    kind: FailureKind | None
    known: str


def code_of(error: BaseException) -> str:
    """Return the code with which a server's error begins, such as ``WRONGTYPE``; empty if no server sent it.

    Args:
        error: An exception of the driver.
    """
    name = type(error).__name__
    if name in _OF_CLASS:
        return _OF_CLASS[name]
    text = str(error)
    if name in ("AuthenticationError", "AuthorizationError", "ExternalAuthProviderError"):
        # A newer driver tells the code. Without it: one of the three, all of which are about credentials.
        return str(getattr(error, "status_code", None) or "WRONGPASS")
    if name == "ConnectionError" and text == _TOO_MANY:
        return "ERR"
    if name not in ("ResponseError", "NoSuchFieldsetError"):
        return ""
    code = text.partition(" ")[0]
    return code if code.isupper() else "ERR"


def answered(code: str, message: str, *, whole: bool, reused: bool) -> Answer:
    """Return what an error as the answer to a command says.

    Args:
        code: The error's code.
        message: Its message.
        whole: Whether an error means that the command did nothing.
        reused: Whether the connection had served before: a new one may reach the new primary.
    """
    nothing = whole or code in _BEFORE_SCRIPTS
    kind: FailureKind | None = None
    known = ""
    if code in _FAILED_OVER:
        kind, known = FailureKind.STALE if reused else FailureKind.UNAVAILABLE, _FAILED_OVER[code]
    elif code in _UNAVAILABLE:
        kind, known = FailureKind.UNAVAILABLE, _UNAVAILABLE[code]
    elif code == "ERR" and message.endswith(_TOO_MANY):
        kind, known, nothing = FailureKind.UNAVAILABLE, "the server has too many connections", True
    elif code in _PERMANENT:
        kind, known = FailureKind.PERMANENT, _PERMANENT[code]
    if kind is not None and not nothing:
        return Answer(False, FailureKind.INDETERMINATE, f"{known}; what was done before is not known")
    return Answer(nothing, kind, known)


def classify_connecting(error: BaseException, *, timed_out: bool, resource: str = "") -> Failure:
    """Classify an error of connecting, log-in included: nothing that the body asked for was sent.

    Args:
        error: The exception.
        timed_out: Whether it is a timeout.
        resource: The resource's name.
    """
    code = code_of(error)
    kind, known = FailureKind.UNAVAILABLE, "nothing was sent"
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes(error)):
        kind, known = FailureKind.PERMANENT, "the server's certificate was rejected"
    elif code:
        answer = answered(code, str(error), whole=True, reused=False)
        # What else a server answers to a log-in, such as a database that it does not have, it always answers.
        kind, known = answer.kind or FailureKind.PERMANENT, answer.known or "the server rejected the log-in"
    return Failure(kind, Sent.NOTHING, resource, Phase.CONNECT, code, timed_out=timed_out, known=known)


def classify_unwatched(error: BaseException) -> Failure | None:
    """Classify an exception of a driver without knowledge of the wire; None if it is not a connection failure."""
    name = type(error).__name__
    if code := code_of(error):
        answer = answered(code, str(error), whole=False, reused=True)
        if answer.kind is None:
            return None
        return Failure(answer.kind, Sent.ALL, "", Phase.RESPONSE, code, known=answer.known)
    if name in ("ConnectionError", "TimeoutError"):
        known = "the server may have acted on the command"
        timed_out = name == "TimeoutError"
        return Failure(FailureKind.INDETERMINATE, Sent.UNKNOWN, "", Phase.REQUEST, timed_out=timed_out, known=known)
    return None
