"""FastAPI and Starlette: the declared clients in a web process, on the server's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from workerpools._pools.resource import Resource
from workerpools._process.event_loop import adopted
from workerpools.errors import ConfigurationError

if TYPE_CHECKING:
    from workerpools._celery.pools import WorkerPools

__all__ = ["depends", "lifespan"]


def lifespan(pools: WorkerPools) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """Return an application's lifespan: ``FastAPI(lifespan=lifespan(pools))``, also for Starlette.

    Asynchronous clients live on the server's event loop from its start on. At its end, when the server has finished its
    requests, the values of ``pools`` are closed. In a lifespan of your own: ``async with lifespan(pools)(web): yield``.

    Args:
        pools: The declarations.

    Raises:
        ConfigurationError: At the start: an asynchronous client was used before.
    """

    @asynccontextmanager
    async def run(_: Any) -> AsyncGenerator[None]:
        with adopted():
            try:
                yield
            finally:
                # Closing an asynchronous client waits for the loop.
                await asyncio.to_thread(pools.close)

    return run


@cache
def depends(handle: Any) -> Any:
    """Return FastAPI's ``Depends`` for a resource's value, or for a session per request.

    ``Api = Annotated[httpx.Client, depends(ShopTask.api)]``, ``Own = Annotated[Session, depends(ShopTask.session)]``.
    The endpoint commits the session; what is uncommitted when the request ends is rolled back.

    Args:
        handle: The resource or the session's declaration.

    Raises:
        ConfigurationError: ``handle`` is something else.
    """
    from fastapi import Depends

    if isinstance(handle, Resource):
        resource: Resource[Any] = handle

        async def value() -> Any:
            # Opening may wait.
            return resource.get() if resource.is_open else await asyncio.to_thread(resource.get)

        return Depends(value)
    if not callable(getattr(type(handle), "new", None)):
        raise ConfigurationError(
            f"depends({handle!r}): wanted: a resource or a session's declaration, such as depends(ShopTask.api)"
        )

    def session() -> Iterator[Any]:
        with handle.new() as made:
            yield made

    async def async_session() -> AsyncIterator[Any]:
        async with handle.new() as made:
            yield made

    return Depends(async_session if handle._asynchronous else session)
