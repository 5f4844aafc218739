"""Flower's Pools page and our series on its ``/metrics``: the connection pools of every worker process.

In ``flowerconfig.py``::

    import workerpools.flower

    workerpools.flower.install()

Importing this module does nothing, and does not import Flower.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from workerpools.errors import ConfigurationError

__all__ = ["install"]

logger = logging.getLogger("workerpools.flower")

#: The page's name in Flower's templates and ours.
_NAME = "workerpools"


def install() -> None:
    """Add the Pools page, its link in the navigation bar, readable numbers on the page of a worker, and our series.

    The series are those of :mod:`workerpools.prometheus`, at Flower's ``/metrics``.

    Call it in ``flowerconfig.py``, before Flower builds its application. Further calls change nothing. Where this
    version of Flower is not built as expected, the page is a plain one, and the log says so; it always wants the same
    log-in as Flower's own pages.

    Raises:
        ConfigurationError: Flower is not installed.
    """
    try:
        importlib.import_module("flower")
    except ModuleNotFoundError as error:
        if error.name != "flower":
            raise
        raise ConfigurationError(
            "workerpools.flower.install() needs Flower, which the extra 'flower' brings: pip install flower"
        ) from None
    _set_up()


def _set_up() -> None:
    # Imported late: without Flower's extra there is neither of them.
    from tornado.web import RequestHandler, url

    from workerpools.flower._templates import PoolsLoader
    from workerpools.prometheus import register

    try:
        from flower import urls

        from workerpools.flower._page import STATIC, Assets, PoolsData, PoolsMetrics, PoolsView, Source

        handlers: list[Any] = urls.handlers
        settings: dict[str, Any] = urls.settings
        directory = settings["template_path"]
        base: Any = PoolsView
        if not issubclass(base, RequestHandler):
            raise TypeError("flower.views.BaseHandler is no request handler")
    except (AttributeError, ImportError, KeyError, TypeError) as error:
        # Rather no page than one without a log-in, and rather no page than no Flower.
        logger.error("this version of Flower is not as expected (%s: %s): no Pools page", type(error).__name__, error)
        return
    if any(getattr(handler, "name", None) == _NAME for handler in handlers):
        return
    loader, source = PoolsLoader(str(directory)), Source()
    register(source.snapshots)
    # Before the last one, which takes everything. As objects: of tuples, Flower loses the name under --url_prefix.
    handlers[-1:-1] = [
        url(r"/pools", PoolsView, {"loader": loader}, name=_NAME),
        url(r"/api/pools", PoolsData, {"source": source}, name=f"{_NAME}_data"),
        url(r"/pools/static/(.*)", Assets, {"path": str(STATIC)}, name=f"{_NAME}_static"),
    ]
    # Before Flower's own, which asks no worker.
    handlers.insert(0, url(r"/metrics", PoolsMetrics, {"source": source}, name=f"{_NAME}_metrics"))
    if settings.setdefault("template_loader", loader) is not loader:
        logger.warning("Flower's templates are loaded by something else: its pages have no link to the Pools page")
        return
    for name in ("navbar.html", "worker.html"):
        try:
            loader.load(name)
        except Exception as error:
            # Flower could not show it without us either; the Pools page does without.
            logger.warning("Flower's %s cannot be loaded: %s: %s", name, type(error).__name__, error)
