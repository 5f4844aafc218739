"""What tasks call; no module of tasks."""

from __future__ import annotations

from typing import Any

import requests
from sqlalchemy import delete
from sqlalchemy.orm import Session

from workerpools.sqlalchemy import current_session


class Order:
    """A mapped class."""

    id: Any
    status: str
    attempts: int = 0


def settle(db: Session, order: Order) -> None:
    """Write, two calls deep."""
    keep(order, db)


def keep(order: Order, into: Session) -> None:
    """Write."""
    into.add(order)


def settle_by_itself(order: Order) -> None:
    """Write with the session of whoever calls."""
    session = current_session()
    session.add(order)


def mark_and_tell(task: Any, order: Order) -> None:
    """Change what was loaded elsewhere."""
    order.status = "PAID"
    task.delay(order.id)  # planted: WP210


def cancel(order: int, *, session: Session) -> None:
    """Write by a statement."""
    session.execute(delete(Order).where(Order.id == order))


def give_up(session: Session, order: Order) -> bool:
    """Turn an error into a result."""
    try:
        session.add(order)
        requests.get("http://api.invalid", timeout=3)
    except requests.RequestException:
        return False  # planted: WP211
    return True
