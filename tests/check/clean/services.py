"""What tasks call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import requests
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

SessionLocal = sessionmaker()


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


@contextmanager
def session_scope() -> Iterator[Session]:
    """A session that commits at the block's end."""
    db = SessionLocal()
    try:
        yield db
        db.commit()
    except Exception:
        db.rollback()
        raise
    finally:
        db.close()


@contextmanager
def reading() -> Iterator[Session]:
    """A session that does not commit, unless there was an error to note."""
    db = SessionLocal()
    try:
        yield db
    except Exception:
        db.commit()
    finally:
        db.rollback()


@contextmanager
def twice() -> Iterator[Session]:
    """Enters itself."""
    with twice() as db:
        yield db


class UnitOfWork:
    """Leaves the commit to who uses it."""

    def __enter__(self) -> Session:
        self.db = SessionLocal()
        return self.db

    def __exit__(self, *rest: object) -> None:
        self.db.rollback()
