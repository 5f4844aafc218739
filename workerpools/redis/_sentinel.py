"""Asks Sentinels which server is the primary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workerpools.adapter import deadline

__all__ = ["Sentinel"]


class Sentinel:
    """The Sentinels of a service.

    Args:
        library: The driver.
        servers: Host and port of each Sentinel.
        service: The service's name.
        timeout: How long each may take, in seconds.
        options: The driver's options for a connection to each: user, password, TLS.
    """

    def __init__(
        self, library: Any, servers: Sequence[tuple[str, int]], service: str, timeout: float, options: dict[str, Any]
    ) -> None:
        self._library = library
        #: The one that answered last comes first.
        self._servers = list(servers)
        self._service = service
        self._timeout = timeout
        self._options = options

    def primary(self) -> tuple[str, int]:
        """Return host and port of the primary.

        Raises:
            ConnectionError: The driver's: no Sentinel names one.
        """
        last: Exception | None = None
        for server in list(self._servers):
            try:
                found = self._ask(server)
            except (self._library.RedisError, OSError) as error:
                last = error
                if deadline().remaining() == 0.0:
                    raise
                continue
            if found is not None:
                self._servers.sort(key=lambda each: each != server)
                return found
        raise self._library.ConnectionError(f"no Sentinel names a primary of {self._service!r}") from last

    def _ask(self, server: tuple[str, int]) -> tuple[str, int] | None:
        timeout = deadline().clamp(self._timeout, 0.001)
        connection = self._library.sentinel_connection(
            host=server[0],
            port=server[1],
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            protocol=2,
            **self._library.quiet,
            **self._options,
        )
        try:
            connection.connect()
            connection.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
            found = connection.read_response()
        finally:
            connection.disconnect()
        if found is None:
            return None
        host, port = (part.decode() if isinstance(part, bytes) else str(part) for part in found)
        return host, int(port)
