"""Flask: a session per request, which in task bodies is the attempt's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from flask import Flask
from flask.globals import app_ctx
from sqlalchemy.orm import Session, scoped_session

if TYPE_CHECKING:
    from workerpools.sqlalchemy import TaskSession

__all__ = ["request_session"]

S = TypeVar("S", bound=Session)


def request_session(web: Flask, declared: TaskSession[S]) -> scoped_session[S]:
    """Return a ``scoped_session`` for views, models and services: one session per application context.

    The view commits it; what is uncommitted when the context ends is rolled back. In a task body it is the attempt's
    session, which is committed when the body returns.

    Args:
        web: The application.
        declared: The session's declaration.
    """
    make: Any = declared.new
    session: scoped_session[S] = scoped_session(make, scopefunc=_context)
    declared.serve(session)

    @web.teardown_appcontext
    def remove(_: BaseException | None) -> None:
        session.remove()

    return session


def _context() -> int:
    return id(app_ctx._get_current_object())  # type: ignore[attr-defined]
