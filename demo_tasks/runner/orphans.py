"""Ends the children of the demo's worker when its main process is killed; the worker is told to import this module.

A pool child whose main process was killed may wait for ever for a task that nobody sends.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from celery.signals import worker_process_init

_PR_SET_PDEATHSIG = 1
_main = os.getpid()


@worker_process_init.connect(weak=False, dispatch_uid="demo-follow-main-process")
def _follow_main_process(**_: Any) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        # A main process that died before that sends no signal any more.
        if os.getppid() != _main:
            os._exit(1)
