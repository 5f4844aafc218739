"""The shop's tasks: prices and shipments from an HTTP API, orders and payments in PostgreSQL, reservations in Redis.

Each process of the worker has one client of each kind, opened by the first task that uses it.
"""

from __future__ import annotations

import asyncio

import httpx
from sqlalchemy.dialects.postgresql import insert

from demo_tasks.app import app
from demo_tasks.models import Order, Payment, Shipment
from demo_tasks.settings import from_environment
from demo_tasks.tally import Tally
from workerpools import PooledTask, RetryPolicy, WorkerPools
from workerpools.httpx import AsyncHttpxClient, HttpxClient
from workerpools.redis import RedisClient
from workerpools.requests import RequestsSession
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

__all__ = [
    "ShopTask",
    "check_address",
    "compare_suppliers",
    "fetch_price",
    "place_order",
    "reserve_article",
    "sync_shipment",
    "take_payment",
    "tally",
    "track_parcel",
]

settings = from_environment()
pools = WorkerPools(app)
tally = Tally(settings)
tally.watch(pools)


class ShopTask(PooledTask):
    """A task with the shop's clients."""

    abstract = True
    # In seconds. It bounds every statement and request, too: a lock that is never released holds nobody for longer.
    soft_time_limit = 30

    api = pools.add(HttpxClient(base_url=settings.upstream_url))
    db = pools.add(SQLAlchemyEngine(settings.database_url))
    session = TaskSession(db)
    carrier = pools.add(RequestsSession(settings.upstream_url))
    cache = pools.add(RedisClient(settings.redis_url, client_name=settings.client_name))
    suppliers = pools.add(AsyncHttpxClient(base_url=settings.upstream_url))

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


@app.task(base=ShopTask)
def check_address(order_id: str, api: httpx.Client = ShopTask.api.inject()) -> bool:
    """Ask a directory whether an order's address is known; a body without ``self``."""
    answer = api.get(f"/anything/addresses/{order_id}", params={"known": "yes"}).raise_for_status()
    return bool(answer.json()["args"]["known"] == "yes")


@app.task(base=ShopTask, bind=True)
def track_parcel(self: ShopTask, order_id: str) -> str:
    """Ask the carrier where an order's parcel is; over requests, as the SDK of a carrier would."""
    answer = self.carrier.get(f"/anything/parcels/{order_id}", params={"place": "depot"})
    answer.raise_for_status()
    return str(answer.json()["args"]["place"])


@app.task(base=ShopTask, bind=True)
def reserve_article(self: ShopTask, order_id: str, sku: str) -> str:
    """Reserve an article for an order, for an hour."""
    self.cache.set(settings.reservation(order_id), sku, ex=3600)
    return order_id


@app.task(base=ShopTask, bind=True)
async def compare_suppliers(self: ShopTask, sku: str) -> int:
    """Ask two suppliers at the same time what an article costs; return the lower price, in cents."""
    answers = await asyncio.gather(
        *(
            self.suppliers.get(f"/anything/{supplier}/{sku}", params={"cents": cents})
            for supplier, cents in (("north", 90 + len(sku)), ("south", 80 + len(sku)))
        )
    )
    return min(int(answer.raise_for_status().json()["args"]["cents"]) for answer in answers)
