"""Servers that run already and belong to somebody else, with the face of the ones that are started here."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from demo_tasks.servers.errors import ServerError

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_UNSET = "correct it, or unset it to have a server started here"


class ExternalServer:
    """A server that is reached by a URL and never started, stopped or restarted.

    Args:
        url: The server's URL.
        variable: The environment variable that the URL comes from; messages name it.

    Raises:
        ServerError: The URL has none of the schemes that this server can have, or no host.
    """

    managed: ClassVar[bool] = False
    """False: this server belongs to somebody else."""

    schemes: ClassVar[tuple[str, ...]] = ()
    needs_host: ClassVar[bool] = True

    def __init__(self, url: str, variable: str) -> None:
        self._variable = variable
        # The messages never contain the URL, which may contain a password.
        try:
            self._parts: SplitResult = urlsplit(url.strip())
            self._port = self._parts.port
        except ValueError:
            # Neither do they contain what the parser says: of an unescaped password it quotes a part.
            raise ServerError(f"{variable} is not a URL; {_UNSET}.") from None
        if self._parts.scheme.partition("+")[0] not in self.schemes:
            raise ServerError(f"{variable} must be a URL that begins with {' or '.join(self.schemes)}; {_UNSET}.")
        if self.needs_host and not self._parts.hostname:
            raise ServerError(f"{variable} names no host; {_UNSET}.")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.where}>"

    @property
    def where(self) -> str:
        """The server's host and port, and the variable that names it."""
        host = self._parts.hostname or "local socket"
        if any("@" in unquote(part) for part in (host, *self._parts[2:])):
            # A password that was not escaped has ended the host: what stands there is a part of it.
            return f"from {self._variable}"
        host = f"[{host}]" if ":" in host else host
        return f"{host}{'' if self._port is None else f':{self._port}'}, from {self._variable}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    @property
    def running(self) -> bool:
        """True: the server's owner keeps it running."""
        return True

    def start(self) -> Self:
        """Do nothing: the server runs already."""
        return self

    def stop(self) -> None:
        """Do nothing: the server belongs to somebody else."""

    def restart(self) -> None:
        """Refuse.

        Raises:
            ServerError: Always; look at `managed` first.
        """
        raise ServerError(f"The server of {self._variable} belongs to somebody else and stays as it is.")


class ExternalDatabase(ExternalServer):
    """The PostgreSQL server of DATABASE_URL."""

    schemes: ClassVar[tuple[str, ...]] = ("postgresql", "postgres")
    # Without a host, libpq uses the server's Unix socket.
    needs_host: ClassVar[bool] = False

    def __init__(self, url: str, variable: str = "DATABASE_URL") -> None:
        super().__init__(url, variable)

    @property
    def database(self) -> str:
        """The name of the database in the URL."""
        return unquote(self._parts.path.lstrip("/"))

    @property
    def dsn(self) -> str:
        """The libpq URL, without the name of a driver."""
        return self._with_scheme("postgresql")

    def url(self, driver: str = "psycopg2") -> str:
        """Return a SQLAlchemy URL.

        Args:
            driver: The driver's name in SQLAlchemy; it replaces one that the variable names.
        """
        return self._with_scheme(f"postgresql+{driver}")

    def _with_scheme(self, scheme: str) -> str:
        # urlunsplit would write a URL without a host as scheme:/path, which libpq does not take.
        rest = urlunsplit(("", "", *self._parts[2:]))
        return f"{scheme}://{self._parts.netloc}{rest}"


class ExternalRedis(ExternalServer):
    """The Redis or Valkey server of REDIS_URL."""

    schemes: ClassVar[tuple[str, ...]] = ("redis", "rediss")

    def __init__(self, url: str, variable: str = "REDIS_URL") -> None:
        super().__init__(url, variable)

    def url(self, db: int | None = None) -> str:
        """Return the URL of a database.

        Args:
            db: The number of the database; the one of the variable by default.
        """
        if db is None:
            return urlunsplit(self._parts)
        return urlunsplit(self._parts._replace(path=f"/{db}"))


class ExternalUpstream(ExternalServer):
    """The HTTP server of UPSTREAM_URL."""

    schemes: ClassVar[tuple[str, ...]] = ("http", "https")

    def __init__(self, url: str, variable: str = "UPSTREAM_URL") -> None:
        super().__init__(url, variable)

    def url(self, path: str = "") -> str:
        """Return the URL of the server or of a resource on it.

        Args:
            path: The resource's path, with its leading slash.
        """
        return urlunsplit(self._parts).rstrip("/") + path

    def reload(self) -> None:
        """Refuse.

        Raises:
            ServerError: Always; look at `managed` first.
        """
        self.restart()
