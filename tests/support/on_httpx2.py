"""A pytest plugin: ``python -m pytest -p tests.support.on_httpx2 tests/httpx`` runs the tests of httpx on httpx2.

``import httpx`` is httpx2 then, and ``workerpools.httpx`` is ``workerpools.httpx2``, in this process and its forks, not
in programs that a test starts.
"""

from __future__ import annotations

import sys

import httpx2

httpx2.alias_httpx()

import workerpools  # noqa: E402
import workerpools.httpx2  # noqa: E402

workerpools.httpx = workerpools.httpx2  # type: ignore[attr-defined]
for _name, _module in list(sys.modules.items()):
    if _name.partition(".httpx2")[0] == "workerpools":
        sys.modules[_name.replace("httpx2", "httpx", 1)] = _module


def pytest_report_header() -> str:
    return f"tests of httpx, on httpx2 {httpx2.__version__}"
