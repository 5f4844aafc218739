"""The shop's tasks: prices and shipments from an HTTP API, orders and payments in PostgreSQL.

Each process of the worker has one HTTP client and one database engine, opened by the first task that uses them.
"""

from __future__ import annotations

from sqlalchemy.dialects.postgresql import insert

from demo_tasks.app import app
from demo_tasks.models import Order, Payment, Shipment
from demo_tasks.settings import from_environment
from demo_tasks.tally import Tally
from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

__all__ = ["ShopTask", "fetch_price", "place_order", "sync_shipment", "take_payment", "tally"]

settings = from_environment()
pools = WorkerPools(app)
tally = Tally(settings)
tally.watch(pools)


class ShopTask(PooledTask):
    """A task with the shop's HTTP client and its database."""

    abstract = True

    api = pools.add(HttpxClient(base_url=settings.upstream_url))
    db = pools.add(SQLAlchemyEngine(settings.database_url))
    session = TaskSession(db)

    # These tasks may run twice: what they write has the order's id as its key. So they may run again even where nobody
    # can know whether the first run was done.
    idempotent = True
    replay = RetryPolicy(max_retries=5, backoff=1, backoff_max=10)


# httpbin answers /anything with what it was asked, and so can stand for any of these APIs.


@app.task(base=ShopTask, bind=True)
def fetch_price(self: ShopTask, sku: str) -> int:
    """Ask the catalogue what an article costs, in cents."""
    answer = self.api.get(f"/anything/catalogue/{sku}", params={"cents": 100 + len(sku)}).raise_for_status()
    return int(answer.json()["args"]["cents"])


@app.task(base=ShopTask, bind=True)
def place_order(self: ShopTask, order_id: str, sku: str, quantity: int) -> str:
    """Write an order; again, if it is there already."""
    order = {"sku": sku, "quantity": quantity}
    statement = insert(Order).values(id=order_id, **order).on_conflict_do_update(index_elements=[Order.id], set_=order)
    self.session.execute(statement)
    return order_id  # committed when the body returns


@app.task(base=ShopTask, bind=True)
def take_payment(self: ShopTask, order_id: str, cents: int) -> str:
    """Have the payment service charge the customer, and keep its receipt."""
    answer = self.api.post(
        "/anything/payments",
        json={"order": order_id, "cents": cents},
        # The service charges once for a key, however often it is asked.
        headers={"Idempotency-Key": f"payment-{order_id}"},
    ).raise_for_status()
    receipt = str(answer.json()["headers"]["Idempotency-Key"])
    self.session.merge(Payment(order_id=order_id, cents=cents, receipt=receipt))
    return receipt


@app.task(base=ShopTask, bind=True)
def sync_shipment(self: ShopTask, order_id: str) -> str:
    """Ask the carrier about an order, and keep the answer."""
    answer = self.api.get(f"/anything/shipments/{order_id}", params={"status": "on its way"}).raise_for_status()
    status = str(answer.json()["args"]["status"])
    self.session.merge(Shipment(order_id=order_id, status=status))
    return status
