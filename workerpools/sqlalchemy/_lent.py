"""Gives back what an attempt has left checked out of an engine's connection pool."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Any

from sqlalchemy.engine import Connection

__all__ = ["LENT", "Lent", "reclaim"]

#: Where a connection's ``info`` tells who has it.
LENT = "workerpools lent"


class Lent:
    """Who has a connection: held weakly, so that one that nobody holds any more goes back by itself.

    Args:
        borrower: What the pool has given out.
    """

    __slots__ = ("_borrower", "_connection", "thread")

    def __init__(self, borrower: Any) -> None:
        self._borrower = weakref.ref(borrower)
        self._connection: weakref.ref[Connection] | None = None
        #: The thread that has begun the last statement on it; 0 before the first.
        self.thread = 0

    def wrapped(self, connection: Connection) -> None:
        """Note the ``Connection`` that it is a part of."""
        self._connection = weakref.ref(connection)

    def give_back(self) -> bool:
        """Roll back and give the connection back to its pool; return whether it was still out.

        Raises:
            Exception: It did not go back; it is not used again.
        """
        connection = None if self._connection is None else self._connection()
        borrower = self._borrower()
        try:
            if connection is not None and not connection.closed:
                # The outer one: whoever uses it later is told that it is closed.
                connection.close()
                return True
            if borrower is not None and borrower.dbapi_connection is not None:
                borrower.close()
                return True
        except BaseException:
            with contextlib.suppress(BaseException):
                if borrower is not None:
                    borrower.invalidate()
            raise
        return False


def reclaim(info: Any) -> bool:
    """Give back the connection with that ``info``, unless another thread has used it last: it may still do so.

    Args:
        info: The dictionary of its record in the pool.

    Returns:
        Whether it was given back.
    """
    lent: Lent | None = info.get(LENT)
    if lent is None or lent.thread not in (0, threading.get_ident()):
        return False
    return lent.give_back()
