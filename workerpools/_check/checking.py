"""Runs the checks. ``import workerpools`` loads this module: it imports them on use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from celery import Celery

if TYPE_CHECKING:
    from workerpools._check.asked import Asked
    from workerpools._check.findings import Finding

__all__ = ["check"]


def check(
    app: Celery,
    *,
    probe: bool = False,
    budget: bool = False,
    workers: int | None = None,
    concurrency: int | None = None,
) -> list[Finding]:
    """Return what is wrong with an app, as ``celery -A … pools check`` does; for a test: ``assert not check(app)``.

    Imports the app once more, in a process of its own. Opens no connection by itself unless ``probe`` or ``budget``
    says so.

    Args:
        app: The app; an importable module has it as an attribute.
        probe: Whether to open one connection per HTTP resource, to compare its keep-alive time with the server's.
        budget: Whether to open one connection per database, to compare what the workers may open with what it allows.
        workers: For the budget: how many workers; without it and ``concurrency``, those that run are asked.
        concurrency: For the budget: the concurrency of each; by default that of the app's settings.

    Returns:
        The findings, those that matter most first, without those that the setting ``workerpools_check_ignore`` or a
        comment in the source leaves out.
    """
    from workerpools._celery.settings import read_setting
    from workerpools._check import codes, silences
    from workerpools._check.asked import Asked

    app.loader.import_default_modules()
    app.finalize()
    asked = Asked(app, probe, codes.ALL)
    reasons: dict[str, str] = read_setting(app.conf, "check_ignore", {})
    found = [*silences.in_setting(reasons, codes.ALL)]
    for each in _checks():
        found += each(asked)
    if budget:
        from workerpools._check import asking

        found += asking.findings_of(app, workers, concurrency)
    order = ("error", "warning", "hint")
    left = silences.left(dict.fromkeys(found), reasons, asked.silenced)
    return sorted(left, key=lambda finding: (order.index(finding.severity), finding.code, _place(finding.where)))


def _checks() -> list[Callable[[Asked], list[Finding]]]:
    from workerpools._check import fork_hazards, settings, source

    return [fork_hazards.check, source.check, settings.check]


def _place(where: str) -> tuple[str, int]:
    path, _, line = where.rpartition(":")
    return (path, int(line)) if path and line.isdigit() else (where, 0)
