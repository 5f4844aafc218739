"""``celery -A app pools``, with ``check``. Every ``celery`` command loads this module, so it imports lazily."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from workerpools._celery.cli.commands import asking, pools, print_json, screen_of

__all__ = ["pools"]

F = TypeVar("F", bound=Callable[..., Any])


def _explain(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is None or ctx.resilient_parsing:
        return
    from workerpools._check.codes import ALL

    code = ALL.get(value.upper())
    if code is None:
        raise click.BadParameter(f"there is no code {value!r}; the codes are: {', '.join(sorted(ALL))}")
    example = "\n".join(f"    {line}" for line in code.example.splitlines())
    click.echo(f"{code.code} ({code.severity}): {code.title}\n\n{example}\n\nWhy: {code.why}\nFix: {code.fix}")
    ctx.exit()


def _planning(command: F) -> F:
    for option in (
        click.option(
            "--workers", type=click.IntRange(min=1), help="Plan for so many workers, in place of those that run."
        ),
        click.option("--concurrency", type=click.IntRange(min=1), help="The concurrency of each planned worker."),
    ):
        command = option(command)
    return command


@pools.command()
@click.option("-j", "--json", "as_json", is_flag=True, help="Print a JSON document.")
@click.option("--explain", metavar="CODE", callback=_explain, is_eager=True, help="Explain a code, and exit.")
@click.option(
    "--probe",
    is_flag=True,
    help="Open one connection per HTTP resource, to compare keep-alive times with the server's.",
)
@click.option(
    "--budget",
    is_flag=True,
    help="Open one connection per database, to compare what the workers may open with what the server allows.",
)
@_planning
@click.pass_context
def check(
    ctx: click.Context,
    *,
    as_json: bool,
    explain: Any,
    probe: bool,
    budget: bool,
    workers: int | None,
    concurrency: int | None,
) -> None:
    """Find what is wrong with the app before it runs: fork hazards, source, settings.

    Opens no connection unless --probe or --budget says so. Imports the app once more, in a process of its own.

    Exits with 0 if nothing was found or hints alone, with 1 for warnings, and with 2 for errors.
    """
    from workerpools._check import checking, findings
    from workerpools.errors import ConfigurationError

    if not budget and (workers or concurrency):
        raise click.UsageError("--workers and --concurrency are for --budget.")
    try:
        found = checking.check(ctx.obj.app, probe=probe, budget=budget, workers=workers, concurrency=concurrency)
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        print_json(findings.document(found))
    else:
        for each in found:
            click.echo(f"{each}\n    Why: {each.why}\n    Fix: {each.fix}")
        click.echo(_summary(found))
    ctx.exit(findings.exit_status(found))


@pools.command()
@_planning
@click.option(
    "-P",
    "--pool",
    "kind",
    type=click.Choice(("prefork", "solo", "threads", "gevent", "eventlet")),
    help="The execution pool of the planned workers.",
)
@asking
@click.pass_context
def budget(
    ctx: click.Context,
    *,
    workers: int | None,
    concurrency: int | None,
    kind: str | None,
    timeout: float,
    destination: list[str] | None,
    as_json: bool,
) -> None:
    """Compare the connections that the workers may open with what their servers allow.

    Asks the workers that run, or plans for --workers of --concurrency each. Opens one connection per database, to ask
    for its limits and for who is connected.

    Exits with 0; with 69 if no worker replied (with --destination: not all of those).
    """
    from workerpools._check import asking as servers
    from workerpools._check import budget_table
    from workerpools.errors import ConfigurationError

    app = ctx.obj.app
    app.loader.import_default_modules()
    app.finalize()
    try:
        plans = workers is not None or concurrency is not None or kind is not None
        found = (
            servers.planned(app, workers, concurrency, kind) if plans else servers.running(app, timeout, destination)
        )
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from None
    rows = servers.budget_of(app, found)
    if as_json:
        print_json(budget_table.document(rows, found))
    else:
        screen_of(no_color=ctx.obj.no_color).show_sections(budget_table.sections(rows, found))


def _summary(found: list[Any]) -> str:
    counted = [
        (sum(each.severity == severity for each in found), severity) for severity in ("error", "warning", "hint")
    ]
    told = [f"{count} {severity}{'' if count == 1 else 's'}" for count, severity in counted if count]
    return f"{', '.join(told)}; celery pools check --explain CODE explains a code" if told else "Nothing found."
