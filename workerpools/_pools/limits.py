"""What a server says of the connections that its clients may open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workerpools._pools.shared import ExecutionPool

__all__ = ["Limit"]


@dataclass(frozen=True)
class Limit:
    """One limit of a server on its clients' connections, as :meth:`workerpools.Adapter.limits` has found it.

    Attributes:
        server: The server, for people and without secrets: ``PostgreSQL 16.4 at db.example.com:5432``.
        name: What limits: ``max_connections``, ``role app``.
        key: Equal for two resources that share the limit, however they call the server.
        most: The most connections; None if unknown.
        reserved: How many of these this client cannot have.
        open: The connections open now, by anybody, without the one that asked; None if unknown.
        own: How many of these belong to this resource, in any process, by the names that they bear.
        clients: Who has the open ones, and how many; for people, without secrets.
        waits: Whether a client above the limit waits for its turn instead of being refused.
        unknown: Why ``most`` is unknown, without secrets.
        capacity: Like :meth:`workerpools.Adapter.capacity`, but of the connections alone that count against this limit;
            None if all of the resource's do.
    """

    server: str
    name: str
    key: str
    most: int | None = None
    reserved: int = 0
    open: int | None = None
    own: int = 0
    clients: tuple[tuple[str, int], ...] = ()
    waits: bool = False
    unknown: str = ""
    capacity: Callable[[ExecutionPool], int] | None = None
