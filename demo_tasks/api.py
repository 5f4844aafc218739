"""The shop's HTTP API as a WSGI application: ``GET /orders/7``, and httpbin's resources for everything else.

``python -m demo_tasks.api`` serves it on this machine until Ctrl-C, under gunicorn, and keeps idle connections open.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["app", "main"]

_ORDER = re.compile(r"/orders/(\d{1,9})")


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer one request: a WSGI application (PEP 3333)."""
    found = _ORDER.fullmatch(environ["PATH_INFO"])
    if found is None:
        # Not before: the process that only starts the server has no use for it.
        from httpbin import app as httpbin

        answer: Iterable[bytes] = httpbin(environ, start_response)
        return answer
    body = json.dumps({"id": int(found[1]), "sku": "teapot", "quantity": 2}).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the API on 127.0.0.1 until a signal, and print its address.

    Args:
        arguments: The command line; that of the process by default.

    Returns:
        The exit status: 0 when it was stopped; 1 when it did not start, or ended by itself.
    """
    # gunicorn imports this module for the application alone.
    from demo_tasks.runner.signals import Interrupted, Stop
    from demo_tasks.servers import HttpUpstream, ServerError, Workspace

    description = "Serve the demo's HTTP API until Ctrl-C."
    parser = argparse.ArgumentParser(prog="python -m demo_tasks.api", description=description)
    parser.add_argument("--port", type=int, default=0, help="the port; a free one by default")
    port: int = parser.parse_args(arguments).port
    try:
        with Stop() as stop, Workspace() as workspace:
            server = HttpUpstream(workspace, keepalive=75, name="api", port=port or None)
            try:
                server.start()
                print(server.url(), flush=True)
                while server.running:
                    time.sleep(0.2)
                raise ServerError(f"The server ended by itself.\n{server.log_tail()}")
            finally:
                stop.tidy_up()
                server.stop()
    except Interrupted:
        return 0
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
