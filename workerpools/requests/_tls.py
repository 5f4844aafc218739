"""TLS contexts, built anew when a certificate on disk has changed: requests builds one for each connection."""

from __future__ import annotations

import logging
import os
import ssl
from typing import Any

from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3.util import create_urllib3_context

__all__ = ["Contexts"]

logger = logging.getLogger("workerpools")

#: The state of each file: its name and, unless it is missing, when it changed, its size and its inode.
Stamp = tuple[tuple[str, int, int, int], ...]


class Contexts:
    """The contexts of a declaration: one for each pair of ``verify`` and ``cert``.

    Args:
        own: The user's own context, in the place of ``verify=True``; None for requests' authorities.
    """

    def __init__(self, own: ssl.SSLContext | None = None) -> None:
        self._own = own
        self._built: dict[tuple[Any, Any], tuple[Stamp, ssl.SSLContext]] = {}

    @property
    def has_own(self) -> bool:
        """Whether ``verify=True`` stands for a context of the user's."""
        return self._own is not None

    def renew(self) -> None:
        """Build the contexts anew that have files."""
        for key, (stamp, context) in list(self._built.items()):
            if stamp:
                self._built[key] = ((), context)

    def context(self, verify: bool | str, cert: Any) -> ssl.SSLContext:
        """Return the context for a connection; another one if a file has changed.

        Args:
            verify: True, or the path of a file or folder of authorities.
            cert: The client's certificate: None, a path, or (certificate, key).

        Raises:
            OSError: A file is missing or wrong, and there is no earlier context; with one, that is logged.
        """
        chain = () if cert is None else tuple(cert) if isinstance(cert, (tuple, list)) else (cert,)
        key = (verify, chain)
        files = [*chain, *([verify] if isinstance(verify, str) else [])]
        stamp = tuple(map(_state, files)) if files else ()
        found = self._built.get(key)
        if found is not None and found[0] == stamp:
            return found[1]
        try:
            context = self._build(verify, chain)
        except OSError as error:
            if found is None:
                raise
            # A rotation writes one file after the other: the next change is looked at again.
            logger.warning("the changed certificates are not usable yet, the former ones stay in use: %s", error)
            context = found[1]
        self._built[key] = (stamp, context)
        return context

    def _build(self, verify: bool | str, chain: tuple[str, ...]) -> ssl.SSLContext:
        if verify is True and self._own is not None:
            context = self._own
            if chain:
                # The user's own context: it is to be left as it is by files that do not fit.
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(*chain)
        else:
            context = create_urllib3_context()
            authorities = DEFAULT_CA_BUNDLE_PATH if verify is True else str(verify)
            if os.path.isdir(authorities):
                context.load_verify_locations(capath=authorities)
            else:
                context.load_verify_locations(cafile=authorities)
        if chain:
            context.load_cert_chain(*chain)
        return context


def _state(path: str) -> tuple[str, int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return path, 0, 0, 0
    return path, found.st_mtime_ns, found.st_size, found.st_ino
