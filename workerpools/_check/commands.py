"""``celery -A app pools``, with ``check``. Every ``celery`` command loads this module, so it imports lazily."""

from __future__ import annotations

from typing import Any

import click

from workerpools._celery.cli.commands import pools

__all__ = ["pools"]


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


@pools.command()
@click.option("-j", "--json", "as_json", is_flag=True, help="Print a JSON document.")
@click.option("--explain", metavar="CODE", callback=_explain, is_eager=True, help="Explain a code, and exit.")
@click.option(
    "--probe",
    is_flag=True,
    help="Open one connection per HTTP resource, to compare keep-alive times with the server's.",
)
@click.pass_context
def check(ctx: click.Context, *, as_json: bool, explain: Any, probe: bool) -> None:
    """Find what is wrong with the app before it runs: fork hazards, source, settings.

    Opens no connection unless --probe says so. Imports the app once more, in a process of its own.

    Exits with 0 if nothing was found or hints alone, with 1 for warnings, and with 2 for errors.
    """
    from workerpools._check import checking, findings

    found = checking.check(ctx.obj.app, probe=probe)
    if as_json:
        import json

        click.echo(json.dumps(findings.document(found), indent=2))
    else:
        for each in found:
            click.echo(f"{each}\n    Why: {each.why}\n    Fix: {each.fix}")
        click.echo(_summary(found))
    ctx.exit(findings.exit_status(found))


def _summary(found: list[Any]) -> str:
    counted = [
        (sum(each.severity == severity for each in found), severity) for severity in ("error", "warning", "hint")
    ]
    told = [f"{count} {severity}{'' if count == 1 else 's'}" for count, severity in counted if count]
    return f"{', '.join(told)}; celery pools check --explain CODE tells more" if told else "Nothing found."
