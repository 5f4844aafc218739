"""One run of the demo, from the first server's start to the last one's stop."""

from __future__ import annotations

import secrets
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kombu.exceptions import KombuError
from redis import RedisError
from sqlalchemy.exc import SQLAlchemyError

from demo_tasks.runner.errors import DemoError
from demo_tasks.runner.faults import Faults
from demo_tasks.runner.report import write
from demo_tasks.runner.signals import Interrupted, Stop
from demo_tasks.runner.stage import Stage
from demo_tasks.summary import Summary

if TYPE_CHECKING:
    from demo_tasks.runner.screen import Screen

__all__ = ["Demo", "Options"]


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        once: End after the summary.
        report: Where to write the figures; None for nowhere.
        tasks: How many tasks to run.
        concurrency: How many children the worker has.
        servers: Start the servers alone.
        env_file: Where to write their addresses; None for nowhere.
    """

    once: bool
    report: Path | None
    tasks: int
    concurrency: int
    servers: bool = False
    env_file: Path | None = None


class Demo:
    """One run.

    Args:
        options: What the command line asks for.
        screen: Where the user looks.
        stop: Tells of Ctrl-C.
    """

    def __init__(self, options: Options, screen: Screen, stop: Stop) -> None:
        self._options = options
        self._screen = screen
        self._stop = stop
        self._token = secrets.token_hex(4)
        self._stage = Stage(screen, self._token, options.concurrency)

    def run(self) -> bool:
        """Run the demo; return whether it came to what it should.

        Raises:
            DemoError: The run cannot go on.
            ServerError: A server, the worker or Flower does not start.
            Interrupted: The user wants it to end, and the summary is not there yet.
        """
        self._stop.hurry = self._stage.hurry
        self._screen.opening(self._options.tasks, self._options.concurrency)
        with ExitStack() as stack:
            try:
                self._stage.start(stack)
                summary = self._load()
                self._show(summary)
                if not self._options.once:
                    self._stay()
            finally:
                self._stop.tidy_up()
        summary.connections_at_stop = self._stage.connections_at_stop
        self._screen.say(f"Connections of the worker after its stop: {summary.connections_at_stop}")
        self._report(summary)
        return summary.ok

    def _load(self) -> Summary:
        # The app reads its servers when it is imported: not before they run.
        from demo_tasks.load import Load, Stalled

        stage = self._stage
        tasks = self._options.tasks
        faults = Faults(
            stage.database,
            stage.upstream,
            cache=stage.cache if stage.own_cache else None,
            children=self._options.concurrency,
            tasks=tasks,
            relay=stage.relay,
        )
        try:
            load = Load(self._token, tasks)
            with self._screen.bar(tasks) as bar:
                while not load.finished:
                    load.step()
                    self._stop.check()
                    stage.check_alive()
                    if faults.step(load.done):
                        self._screen.say(f"at {load.done:,} tasks: {faults}")
                    bar.update(load.done)
            summary = load.summary({**stage.database.count_rows(self._token), **stage.cache.count_rows(self._token)})
        except (KombuError, RedisError, SQLAlchemyError, Stalled) as error:
            # The death of a server explains more than what it does to its clients.
            stage.check_alive()
            raise DemoError(f"{error}\nThe worker's last log lines:\n{stage.worker.log_tail()}") from error
        summary.backends_killed = faults.backends_killed
        summary.cache_killed = faults.cache_killed
        summary.commits_lost = faults.commits_lost
        summary.upstream_reloaded = faults.upstream_reloaded
        return summary

    def _show(self, summary: Summary) -> None:
        self._screen.summary(summary)
        self._screen.say(f"Every process's connections, in Flower: {self._stage.flower.pools_url()}")
        self._report(summary)

    def _report(self, summary: Summary) -> None:
        if self._options.report is None:
            return
        try:
            write(self._options.report, {**summary.report(), "flower": self._stage.flower.url()})
        except OSError as error:
            raise DemoError(f"The report cannot be written: {error}") from error

    def _stay(self) -> None:
        try:
            self._screen.say("Everything stays up until Ctrl-C.")
            while True:
                time.sleep(0.5)
                self._stop.check()
                self._stage.check_alive()
        except Interrupted:
            self._screen.say("")
