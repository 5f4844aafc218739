"""What tasks call; no module of tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests
from planted.hazards import engine
from sqlalchemy import delete
from sqlalchemy.orm import Session, sessionmaker

from workerpools.sqlalchemy import current_session

SessionLocal = sessionmaker(engine)


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
def begun() -> Iterator[Session]:
    """The same, by a block of the library's."""
    with SessionLocal() as made, made.begin():
        yield made


@contextmanager
def kept(db: Session) -> Iterator[None]:
    """Commits what it is given."""
    yield
    db.commit()


@contextmanager
def of_the_run() -> Iterator[Session]:
    """The run's session, which commits later."""
    yield current_session()


class UnitOfWork:
    """A session that commits at the block's end, as a class."""

    def __enter__(self) -> Session:
        self.db = SessionLocal()
        return self.db

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.db.commit()
        self.db.close()
