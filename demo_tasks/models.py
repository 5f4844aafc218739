"""The shop's tables."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = ["Base", "Order", "Payment", "Shipment"]


class Base(DeclarativeBase):
    """What the tables have in common."""


class Order(Base):
    """What a customer ordered."""

    __tablename__ = "orders"

    id: Mapped[str] = mapped_column(primary_key=True)
    sku: Mapped[str]
    quantity: Mapped[int]
    placed_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Payment(Base):
    """What was paid for an order: once an order, which the primary key makes sure of.

    No foreign key: the tasks of an order run in any order, so that a payment may be known before its order is.
    """

    __tablename__ = "payments"

    order_id: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int]
    receipt: Mapped[str]


class Shipment(Base):
    """What the carrier last said about an order."""

    __tablename__ = "shipments"

    order_id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
