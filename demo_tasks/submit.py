"""``python -m demo_tasks.submit``: gives the demo's tasks to a worker that runs elsewhere, and reports on them.

The servers are those of REDIS_URL and DATABASE_URL. Writes plain lines; the exit status is 0 when every task succeeded.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Sequence

from kombu.exceptions import KombuError
from redis import RedisError
from sqlalchemy.exc import SQLAlchemyError

from demo_tasks.cache import Cache
from demo_tasks.database import Database
from demo_tasks.load import Load, Stalled
from demo_tasks.settings import Settings, from_environment
from demo_tasks.summary import Summary
from demo_tasks.tally import connect

__all__ = ["main"]

# How long the servers may take to answer, and how often a line tells of the progress, in seconds.
START_TIMEOUT = 60.0
LINE_EVERY = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit the tasks, wait for them, print what they came to.

    Args:
        arguments: The command line; that of the process by default.

    Returns:
        The exit status: 0 when every task succeeded, else 1.
    """
    parser = argparse.ArgumentParser("python -m demo_tasks.submit", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--tasks", type=int, default=2000, help="how many tasks to submit (%(default)s)")
    tasks: int = parser.parse_args(arguments).tasks
    if tasks < 1:
        parser.error("--tasks must be above 0")
    try:
        summary = _submit(from_environment(), tasks)
    except (KombuError, RedisError, SQLAlchemyError, Stalled) as error:
        print(f"submit: {getattr(error, 'orig', error)}", file=sys.stderr, flush=True)
        return 1
    for line in (*summary.lines(), *summary.child_lines()):
        print(line, flush=True)
    return 0 if summary.ok else 1


def _submit(settings: Settings, tasks: int) -> Summary:
    database = Database(settings.database_url)
    database.wait(START_TIMEOUT)
    _wait_for_redis(settings)
    database.create_tables()
    # The broker and the tables may hold earlier runs.
    run = secrets.token_hex(4)
    load = Load(run, tasks)
    print(f"submitting {tasks:,} tasks", flush=True)
    next_line = time.monotonic() + LINE_EVERY
    while not load.finished:
        load.step()
        if time.monotonic() >= next_line:
            next_line = time.monotonic() + LINE_EVERY
            print(f"{load.done:,} of {tasks:,} tasks done", flush=True)
    return load.summary({**database.count_rows(run), **Cache(settings).count_rows(run)})


def _wait_for_redis(settings: Settings) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    client = connect(settings.redis_url)
    try:
        while True:
            try:
                client.ping()
                return
            except RedisError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(0.5)
    finally:
        client.close()


if __name__ == "__main__":
    sys.exit(main())
