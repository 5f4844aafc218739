"""An application that imports another one, and uses its task base beside resources of its own."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from tests.worker import shop
from workerpools import WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

broker = os.environ["SHOP_BROKER"]
app = Celery("outlet", broker=broker, backend=broker)
pools = WorkerPools(app)


class OutletTask(shop.ShopTask):
    """The other application's client and engine, and a second engine with the session."""

    outlet = pools.add(SQLAlchemyEngine(os.environ["SHOP_DATABASE"]))
    session = TaskSession(outlet)


@app.task(base=OutletTask, bind=True, name="shop.outlet")
def outlet(self: OutletTask, token: str) -> dict[str, Any]:
    """Use both engines and the client."""
    with self.db.connect() as connection:
        other = connection.scalar(shop.BACKEND)
    return {
        "pid": os.getpid(),
        "right": self.api.get(f"/echo/{token}").text == token,
        "backends": [other, self.session.scalar(shop.BACKEND)],
        "sizes": [self.db.pool.size(), self.outlet.pool.size()],
    }
