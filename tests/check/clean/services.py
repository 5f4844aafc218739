"""What tasks call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import requests
from sqlalchemy import select
from sqlalchemy.orm import Session


class Order:
    """A mapped class."""

    id: Any
    status: str = ""
    lines: dict[str, int]


def find(session: Session, order: int) -> Order | None:
    """Read."""
    return session.scalar(select(Order).where(Order.id == order))


def mark(order: Order) -> None:
    """Change what nobody has loaded."""
    order.status = "PAID"


def save_and_commit(db: Session, order: Order) -> None:
    """Write, and commit."""
    db.add(order)
    db.commit()


def committing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Commit after the function."""
    return function


@committing
def settle(session: Session, order: Order) -> None:
    """Write, and the decorator commits."""
    session.add(order)


def try_to_keep(session: Session, order: Order) -> bool:
    """Return an error, which is looked at."""
    try:
        session.add(order)
        requests.get("http://api.invalid", timeout=3)
    except requests.RequestException:
        return False
    return True
