"""The shop's HTTP API as a WSGI application: ``GET /orders/7``, and httpbin's resources for everything else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from httpbin import app as _httpbin

__all__ = ["app"]

_ORDER = re.compile(r"/orders/(\d{1,9})")


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer one request: a WSGI application (PEP 3333)."""
    found = _ORDER.fullmatch(environ["PATH_INFO"])
    if found is None:
        answer: Iterable[bytes] = _httpbin(environ, start_response)
        return answer
    body = json.dumps({"id": int(found[1]), "sku": "teapot", "quantity": 2}).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
