"""The command line of the demo."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from demo_tasks.runner.demo import Demo, Options
from demo_tasks.runner.errors import DemoError
from demo_tasks.runner.report import check_writable
from demo_tasks.runner.screen import Screen
from demo_tasks.runner.signals import Interrupted, Stop
from demo_tasks.runner.standing import StandingServers
from demo_tasks.servers import ServerError

__all__ = ["at_least_one", "main"]

_DESCRIPTION = """\
Runs an order service on this machine: PostgreSQL, Redis, an HTTP server, a Celery worker and Flower. Cuts every
connection of the worker in the middle of the load, and shows what that cost.
"""
_EPILOG = "DATABASE_URL, REDIS_URL and UPSTREAM_URL name servers to use instead of local ones."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        arguments: The command line; that of the process by default.

    Returns:
        The exit status: 0 when every task succeeded, or the servers alone were stopped; 1 when not or when the run
        could not go on; 128 and the signal's number when it was interrupted before the summary.
    """
    _open_standard_streams()
    options = _parse(arguments)
    screen = Screen()
    try:
        if options.report is not None:
            check_writable(options.report)
        with Stop() as stop:
            if options.servers:
                StandingServers(screen, stop, options.env_file).run()
                return 0
            return 0 if Demo(options, screen, stop).run() else 1
    except Interrupted as interrupted:
        screen.fail("interrupted before the end; everything is stopped")
        return 128 + interrupted.number
    except (DemoError, ServerError) as error:
        screen.fail(str(error))
        return 1


def at_least_one(text: str) -> int:
    """Return the number in ``text``, for argparse.

    Raises:
        ValueError: It is no whole number above 0.
    """
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


# argparse names the type in its message.
at_least_one.__name__ = "number above 0"


def _parse(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser("python -m demo_tasks", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--once", action="store_true", help="end after the summary, with status 1 if a task failed")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the figures to FILE, as JSON")
    parser.add_argument("--tasks", type=at_least_one, default=2000, help="how many tasks to run (%(default)s)")
    parser.add_argument(
        "--concurrency", type=at_least_one, default=4, help="how many children the worker has (%(default)s)"
    )
    parser.add_argument(
        "--servers", action="store_true", help="start the servers alone, print their addresses, stay until Ctrl-C"
    )
    parser.add_argument(
        "--env-file", type=Path, metavar="FILE", help="with --servers: write the addresses to FILE, for a shell's `.`"
    )
    options = Options(**vars(parser.parse_args(arguments)))
    if options.servers and (options.once or options.report is not None):
        parser.error("--servers runs no task: leave out --once and --report")
    if options.env_file is not None and not options.servers:
        parser.error("--env-file goes with --servers")
    return options


def _open_standard_streams() -> None:
    # Started with one of them closed, the next file or socket would get its number, and be taken for it by a child.
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
