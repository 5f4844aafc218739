"""Puts the Pools page and our series into Flower, before Flower builds its application."""

from __future__ import annotations

import logging
from typing import Any

from tornado.web import RequestHandler, url

from workerpools.flower._source import Source
from workerpools.flower._templates import PoolsLoader
from workerpools.prometheus import register

__all__ = ["set_up"]

logger = logging.getLogger("workerpools.flower")

#: What Flower's templates and ours call the page.
_NAME = "workerpools"


def set_up() -> None:
    """Add what is missing of the page to Flower's handlers and settings."""
    try:
        from flower import urls

        from workerpools.flower._handlers import STATIC, Assets, PoolsData, PoolsMetrics, PoolsView

        handlers: list[Any] = urls.handlers
        settings: dict[str, Any] = urls.settings
        directory = settings["template_path"]
        base: Any = PoolsView
        if not issubclass(base, RequestHandler):
            raise TypeError("flower.views.BaseHandler is no request handler")
    except (AttributeError, ImportError, KeyError, TypeError) as error:
        # Whatever it is: the page must not be open to everyone, and Flower is worth more than the page.
        logger.error("this version of Flower is not as expected (%s: %s): no Pools page", type(error).__name__, error)
        return
    if any(getattr(handler, "name", None) == _NAME for handler in handlers):
        return
    loader, source = PoolsLoader(str(directory)), Source()
    register(source.snapshots)
    # Before the last one, which is for everything. Objects: of tuples Flower loses the name under --url_prefix.
    handlers[-1:-1] = [
        url(r"/pools", PoolsView, {"loader": loader}, name=_NAME),
        url(r"/api/pools", PoolsData, {"source": source}, name=f"{_NAME}_data"),
        url(r"/pools/static/(.*)", Assets, {"path": str(STATIC)}, name=f"{_NAME}_static"),
    ]
    # Flower's own comes before the others, and asks nobody.
    handlers.insert(0, url(r"/metrics", PoolsMetrics, {"source": source}, name=f"{_NAME}_metrics"))
    if settings.setdefault("template_loader", loader) is not loader:
        logger.warning("Flower's templates are loaded by something else: its pages have no link to the Pools page")
        return
    for name in ("navbar.html", "worker.html"):
        try:
            loader.load(name)
        except Exception as error:
            # What Flower cannot show without us either is not for us to repair; the Pools page does without.
            logger.warning("Flower's %s cannot be loaded: %s: %s", name, type(error).__name__, error)
