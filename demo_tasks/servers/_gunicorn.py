"""The configuration file of the local HTTP server; gunicorn reads it, nothing imports it."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

# With the application, once: its first request has no time for it.
importlib.import_module("httpbin")

# Names are gunicorn's settings. A version that does not know one ignores it.
control_socket_disable = True
worker_class = "gthread"
# The application is loaded once, so that a reload has its new worker at once.
preload_app = True
# As long as httpbin's slowest resource, /delay/10. gunicorn 25 and 26 keep idle connections open that long on
# a reload.
graceful_timeout = 10

_PR_SET_PDEATHSIG = 1


def post_fork(server: Any, worker: Any) -> None:
    """Tie a worker's life to the master's, which may be killed without a chance to stop its workers."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != server.pid:
            os._exit(1)
