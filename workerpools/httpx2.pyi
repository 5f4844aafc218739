# What type checkers see of workerpools/httpx2.py: workerpools/httpx with the classes of httpx2. A test compares both.

import os
import ssl
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import httpx2  # pyright: ignore[reportMissingImports]  # it needs Python 3.11

from workerpools.adapter import Adapter, ExecutionPool, Failure, Opening

__all__ = ["DEFAULT_TIMEOUT", "AsyncHttpxClient", "HttpxClient", "classify", "default_limits"]

C = TypeVar("C", httpx2.Client, httpx2.AsyncClient)

DEFAULT_TIMEOUT: httpx2.Timeout

def default_limits(execution_pool: ExecutionPool, max_connections: int | None = None) -> httpx2.Limits: ...
def classify(error: BaseException) -> Failure | None: ...

class _Declared(Adapter[C]):  # type: ignore[misc]  # each client has its close()
    def __init__(
        self,
        *,
        timeout: Any = ...,
        total_timeout: float | None = None,
        limits: httpx2.Limits | None = None,
        verify: ssl.SSLContext | str | os.PathLike[str] | bool = True,
        cert: Any = None,
        trust_env: bool = True,
        http1: bool = True,
        http2: bool = False,
        proxy: Any = None,
        mounts: Mapping[str, Any] | None = None,
        transport: Any = None,
        uds: str | os.PathLike[str] | None = None,
        local_address: str | None = None,
        socket_options: Iterable[tuple[Any, ...]] | None = None,
        cookies: Any = "attempt",
        max_connections: int | None = None,
        max_lifetime: float | None = 300.0,
        max_lifetime_jitter: float = 0.1,
        credentials: Callable[[], tuple[str, str] | str] | None = None,
        on_open: Callable[[C], object] | None = None,
        leak_after: float | None = None,
        **options: Any,
    ) -> None: ...
    def open(self, opening: Opening) -> C: ...
    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> _Declared[C]: ...

class HttpxClient(_Declared[httpx2.Client]):
    def close(self, value: httpx2.Client, timeout: float) -> None: ...

class AsyncHttpxClient(_Declared[httpx2.AsyncClient]):
    def close(self, value: httpx2.AsyncClient, timeout: float) -> None: ...
