"""What a use is, and how its results and errors are made comparable."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy

PSYCOPG2 = ("psycopg2",)
PSYCOPG = ("psycopg",)

#: Where a server names the line and shows a caret below it. A statement that was sent together with others has another
#: number, and the caret moves with its width.
_LINE = re.compile(r"LINE (\d+): (.*)\n( *)\^")
#: Addresses, SQLAlchemy's names of cursors after them, and its random names of transactions.
_CHANGING = re.compile(r"\bc_[0-9a-f]+_[0-9a-f]+\b|_sa_[0-9a-f]{32}|0x[0-9a-f]+")

_DIAGNOSTICS = (
    *("severity", "message_primary", "message_detail", "message_hint", "context"),
    *("schema_name", "table_name", "column_name", "datatype_name", "constraint_name", "internal_query"),
)


@dataclass(frozen=True)
class Use:
    """One use of an engine.

    Attributes:
        run: Uses the engine; returns what is compared.
        drivers: SQLAlchemy's names of the drivers that it is meant for.
        options: Options of the engine.
    """

    run: Callable[[sqlalchemy.Engine], object]
    drivers: Sequence[str] = (*PSYCOPG2, *PSYCOPG)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.run.__name__


#: All of them, in the order of their modules.
USES: list[Use] = []


def use(
    drivers: Sequence[str] = (*PSYCOPG2, *PSYCOPG), **options: Any
) -> Callable[[Callable[[sqlalchemy.Engine], object]], Callable[[sqlalchemy.Engine], object]]:
    """Add the decorated function to `USES`; options are those of ``create_engine``."""

    def add(run: Callable[[sqlalchemy.Engine], object]) -> Callable[[sqlalchemy.Engine], object]:
        assert run.__name__ not in [other.name for other in USES], run.__name__
        USES.append(Use(run, drivers, options))
        return run

    return add


def caught(action: Callable[..., object], *arguments: object) -> object:
    """Return what the action returns, or a comparable account of its exception."""
    try:
        return plain(action(*arguments))
    except Exception as error:
        return told(error)


def plain(value: Any) -> object:
    """Return a comparable copy: results and rows as lists, buffers as bytes, exceptions as their accounts."""
    if isinstance(value, BaseException):
        return told(value)
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, sqlalchemy.Row)):
        return [plain(part) for part in value]
    if isinstance(value, sqlalchemy.CursorResult):
        return plain(value.all()) if value.returns_rows else value.rowcount
    if isinstance(value, str):
        # SQLAlchemy's bit strings cannot be copied, as Celery does with a result.
        return "".join(value)
    if isinstance(value, float):
        # NaN differs from itself.
        return repr(value)
    return bytes(value) if isinstance(value, memoryview) else value


def told(error: BaseException) -> dict[str, object]:
    """Return all that is comparable of an exception: its class, code and texts.

    The position of an error is not: it counts from the beginning of what was sent, which may be more than the
    statement.
    """
    original = getattr(error, "orig", None)
    found: dict[str, object] = {
        "class": f"{type(error).__module__}.{type(error).__qualname__}",
        "text": _settled(str(error)),
        "code": getattr(error, "sqlstate", None) or getattr(error, "pgcode", None),
        "statement": getattr(error, "statement", None),
        "invalidated": getattr(error, "connection_invalidated", None),
    }
    diagnostics = getattr(error, "diag", None)
    if diagnostics is not None:
        found["diagnostics"] = {name: _settled(getattr(diagnostics, name) or "") for name in _DIAGNOSTICS}
    if original is not None:
        found["original"] = told(original)
    return found


def _settled(message: str) -> str:
    return _CHANGING.sub("...", _LINE.sub(_without_number, message))


def _without_number(match: re.Match[str]) -> str:
    number, line, indent = match.groups()
    return f"LINE n: {line}\n{indent[len(f'LINE {number}: ') :]}^"


def driver_of(connection: sqlalchemy.Connection) -> Any:
    """Return the driver's own connection."""
    return connection.connection.dbapi_connection


def status_of(connection: Any) -> int:
    """Return libpq's transaction status of a driver's connection."""
    connection = getattr(connection, "dbapi_connection", connection)
    if hasattr(connection, "get_transaction_status"):
        return int(connection.get_transaction_status())
    return int(connection.info.transaction_status)
