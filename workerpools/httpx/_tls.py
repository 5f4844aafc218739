"""The TLS context of a client, built anew when a certificate on disk has changed."""

from __future__ import annotations

import logging
import os
import ssl
from typing import Any

from workerpools.errors import ConfigurationError

from ._library import httpx
from ._options import check_files

__all__ = ["Certificates"]

logger = logging.getLogger("workerpools")

#: The state of each file: its name and, unless it is missing, when it changed, its size and its inode.
Stamp = tuple[tuple[str, int, int, int], ...]


class Certificates:
    """What a client trusts, and what it presents.

    Args:
        verify: As for ``httpx.Client``, or a path.
        cert: As for ``httpx.Client``.
        trust_env: Whether SSL_CERT_FILE and SSL_CERT_DIR apply, as httpx does.
    """

    def __init__(self, verify: Any, cert: Any, trust_env: bool) -> None:
        self._verify = verify
        self._chain: tuple[Any, ...] = (
            () if cert is None else tuple(cert) if isinstance(cert, (tuple, list)) else (cert,)
        )
        self._trust_env = trust_env
        self._context: ssl.SSLContext | None = None
        self._stamp: Stamp | None = ()

    def stamp(self) -> Stamp:
        """Return the state of the files; empty if there are none."""
        paths = [os.fspath(path) for path in self._chain[:2]]
        if isinstance(self._verify, (str, os.PathLike)):
            paths.append(os.fspath(self._verify))
        elif self._verify is True and self._trust_env:
            paths += [path for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if (path := os.environ.get(name))]
        # A rotation may well replace a link to them.
        return tuple(map(_state, paths)) if paths else ()

    def renew(self) -> None:
        """Build the context anew when it is asked for next, if files belong to it."""
        if self._stamp:
            self._stamp = None

    def context(self) -> ssl.SSLContext:
        """Return the context; another one if a file has changed.

        Raises:
            ConfigurationError: A file is missing, and there is no earlier context; with one, that is logged.
            OSError: A file is wrong; likewise.
        """
        stamp = self.stamp()
        if self._context is None or stamp != self._stamp:
            try:
                self._context = self._built()
            except (OSError, ConfigurationError) as error:
                if self._context is None:
                    raise
                # A rotation writes one file after the other: the next change is looked at again.
                logger.warning("the changed certificates are not usable yet, the former ones stay in use: %s", error)
            self._stamp = stamp
        return self._context

    def _built(self) -> ssl.SSLContext:
        check_files(self._verify, self._chain)
        if isinstance(self._verify, ssl.SSLContext):
            context = self._verify
            if self._chain:
                # The user's own context: it is to be left as it is by files that do not fit.
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(*self._chain)
        elif isinstance(self._verify, bool):
            context = httpx.create_ssl_context(verify=self._verify, trust_env=self._trust_env)
        elif os.path.isdir(self._verify):
            context = ssl.create_default_context(capath=os.fspath(self._verify))
        else:
            context = ssl.create_default_context(cafile=os.fspath(self._verify))
        if self._chain:
            context.load_cert_chain(*self._chain)
        return context


def _state(path: str) -> tuple[str, int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return path, 0, 0, 0
    return path, found.st_mtime_ns, found.st_size, found.st_ino
