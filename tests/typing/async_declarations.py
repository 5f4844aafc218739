"""What type checkers infer of an asynchronous engine and session."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from typing_extensions import assert_type

from workerpools import PooledTask, WorkerPools
from workerpools.sqlalchemy import AsyncSQLAlchemyEngine, AsyncTaskSession

pools = WorkerPools()


class OwnSession(AsyncSession):
    """A user's class."""


class ShopTask(PooledTask):
    db = pools.add(AsyncSQLAlchemyEngine("postgresql+psycopg://app@db/shop"))
    session = AsyncTaskSession(db)
    own = AsyncTaskSession(db, class_=OwnSession, expire_on_commit=False)


async def body(self: ShopTask, session: AsyncSession = ShopTask.session.inject()) -> None:
    assert_type(self.db, AsyncEngine)
    assert_type(self.session, AsyncSession)
    assert_type(self.own, OwnSession)
    assert_type(ShopTask.own.get(), OwnSession)
    assert_type(ShopTask.session, AsyncTaskSession)
    await self.session.commit()
