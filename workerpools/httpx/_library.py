"""The client library: httpx; in ``workerpools.httpx2``, which is this package's source under its own name, httpx2."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from workerpools.adapter import explained

__all__ = ["LIBRARIES", "httpx"]

#: The package whose name says which: so this one imports the others of the package relatively.
_package = __name__.rpartition(".")[0]
_name = _package.rpartition(".")[2]

if TYPE_CHECKING:
    import httpx as httpx
else:
    try:
        httpx = import_module(_name)
    except ModuleNotFoundError as error:
        raise explained(error, _package, _name, _name) from None

#: The packages whose exceptions may come from a client.
LIBRARIES = (_name, _name.replace("httpx", "httpcore"), "h11", "h2", "hpack")
