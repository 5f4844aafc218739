"""``celery -A app pools``. Every ``celery`` command loads this module, so it imports lazily."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

import click
from celery.bin.base import COMMA_SEPARATED_LIST

from workerpools._celery.censor import hide_secrets

if TYPE_CHECKING:
    from workerpools._celery.cli.asking import Answers
    from workerpools._celery.cli.plain import PlainScreen
    from workerpools._celery.cli.table import Screen
    from workerpools._stats.report import Workers

__all__ = ["asking", "pools", "print_json", "screen_of"]

F = TypeVar("F", bound=Callable[..., Any])

# Here: ``celery report`` need not create a WorkerPools.
hide_secrets()


@click.group(name="pools")
def pools() -> None:
    """Inspect and recycle the connection pools of running workers; check an app before it runs."""


def asking(command: F) -> F:
    """Give a command the options of those that ask workers."""
    for option in (
        click.option(
            "-t",
            "--timeout",
            type=click.FloatRange(min=0, min_open=True),
            default=1.0,
            show_default=True,
            help="How long to wait for replies, in seconds.",
        ),
        click.option(
            "-d", "--destination", type=COMMA_SEPARATED_LIST, help="Only these workers: comma-separated names."
        ),
        click.option("-j", "--json", "as_json", is_flag=True, help="Print a JSON document."),
    ):
        command = option(command)
    return command


@pools.command()
@asking
@click.option(
    "-w", "--watch", is_flag=True, help="Refresh until Ctrl-C; without a terminal, print one line per resource."
)
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Time between refreshes of --watch, in seconds.",
)
@click.option("--totals", is_flag=True, help="Show totals per worker only, without the processes.")
@click.pass_context
def status(
    ctx: click.Context,
    *,
    timeout: float,
    destination: list[str] | None,
    as_json: bool,
    watch: bool,
    interval: float,
    totals: bool,
) -> None:
    """Show the connection pools of each worker, per process.

    Exits with 0 if workers replied (with --destination: all of those), and with 69 otherwise.
    """
    if as_json and watch:
        raise click.UsageError("--json prints a single document and cannot be combined with --watch.")
    screen = None if as_json else screen_of(no_color=ctx.obj.no_color, totals=totals)
    from workerpools._celery.cli.asking import ask

    def look() -> Answers:
        return ask(ctx.obj.app, "pools", timeout=timeout, destination=destination)

    if screen is not None and watch:
        _watch(look, screen, interval)
        return
    answers = look()
    if screen is not None:
        screen.show(answers.snapshots())
    else:
        from workerpools._stats.report import document

        print_json(document(answers.snapshots(), answers.missing, time.time()))
    answers.check()


@pools.command()
@click.argument("name", required=False)
@asking
@click.pass_context
def recycle(
    ctx: click.Context, *, name: str | None, timeout: float, destination: list[str] | None, as_json: bool
) -> None:
    """Replace the connections of the resource NAME, or of all resources, in every process.

    Each process does so on its next use of the resource. Running tasks, transactions and responses finish on the
    connection they have. Use it after rotating credentials or after a failover.

    Exits with 0 if workers accepted (with --destination: all of those), with 1 if a worker has no such resource, and
    with 69 otherwise.
    """
    from workerpools._celery.cli.asking import ask

    arguments = {} if name is None else {"name": name}
    answers = ask(ctx.obj.app, "pools_recycle", arguments=arguments, timeout=timeout, destination=destination)
    if as_json:
        print_json({"version": 1, "workers": dict(sorted(answers.replies.items())), "missing": [*answers.missing]})
    else:
        for worker in sorted(answers.replies.keys() - answers.refusals().keys()):
            names = answers.replies[worker].get("resources", ())
            click.echo(f"{worker}: {_accepted(names)}")
    answers.check()


def _accepted(names: Collection[str]) -> str:
    if not names:
        return "no resource is declared"
    return f"connections of {', '.join(names)} will be replaced on next use"


def print_json(document: Any) -> None:
    """Print a document."""
    import json

    click.echo(json.dumps(document, indent=2))


def screen_of(*, no_color: bool, totals: bool = False) -> Screen | PlainScreen:
    """Return standard output: with colours where rich is installed."""
    try:
        from workerpools._celery.cli.table import Screen
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        from workerpools._celery.cli.plain import PlainScreen

        return PlainScreen(totals=totals)
    return Screen(no_color=no_color, totals=totals)


def _watch(look: Callable[[], Answers], screen: Screen | PlainScreen, interval: float) -> None:
    """Refresh the screen until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt), screen.watching() as update:
        while True:
            began = time.monotonic()
            update(*_seen(look))
            time.sleep(max(0.0, interval - (time.monotonic() - began)))


def _seen(look: Callable[[], Answers]) -> tuple[Workers, str]:
    # Keep watching while workers stop or the broker restarts.
    workers: Workers = {}
    try:
        answers = look()
        workers = answers.snapshots()
        answers.check()
    except click.ClickException as failed:
        return workers, failed.message
    return workers, ""
