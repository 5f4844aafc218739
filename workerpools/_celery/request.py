"""A Celery task's terms for replays and retries, and its way back to the broker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, cast

from celery import Task
from celery.exceptions import Retry, SoftTimeLimitExceeded, TaskPredicate, TimeLimitExceeded
from celery.utils.time import maybe_iso8601

from workerpools._celery.lifecycle import worker_limits
from workerpools._celery.messages import has_left
from workerpools._celery.settings import read_setting
from workerpools._run.deadline import seconds_allowed
from workerpools._run.delivery import NotSent, RetryPolicy, Terms

__all__ = ["TaskTerms", "check_times"]

#: How far the deadline lies before a time limit, so that an error surfaces before Celery's limit strikes, in seconds.
DEADLINE_MARGIN = 0.1

#: The message header that carries the number of used replays to later deliveries.
REPLAYS = "workerpools_replays"

#: The one that carries the idempotency keys of its requests to its next retry: the retry's number, and the keys.
KEYS = "workerpools_keys"


class TaskTerms(Terms):
    """The terms of one Celery task.

    Args:
        task: The task; its options are read on use, as annotations may change them late.
    """

    #: The setting ``deadline_margin``; None before the first run with a limit.
    _margin: float | None = None
    #: The setting ``replay``; None before the first failure.
    _replays: bool | None = None

    def __init__(self, task: Any) -> None:
        self._task = self.instance = task

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self._task.name)

    @property
    def idempotent(self) -> bool:  # type: ignore[override]
        return bool(self._task.idempotent)

    @property
    def policy(self) -> RetryPolicy | None:  # type: ignore[override]
        policy = RetryPolicy.of(self._task.replay, self.name)
        if self._replays is None:
            self._replays = bool(read_setting(self._task.app.conf, "replay", True))
        if not self._replays:
            return None
        most = _own_max_retries(self._task)
        if policy is None or most is None or most >= policy.max_retries:
            return policy
        return replace(policy, max_retries=most)

    def requests(self) -> list[Any]:
        found: list[Any] = self._task.request_stack.stack
        return found

    def is_control(self, error: BaseException) -> bool:
        return isinstance(error, TaskPredicate)

    def retries(self, request: Any) -> int:
        return int(getattr(request, "retries", 0) or 0)

    def replays(self, request: Any) -> int:
        headers = getattr(request, "headers", None) or {}
        try:
            return max(0, int(headers.get(REPLAYS, 0)))
        except (TypeError, ValueError):
            return 0

    def carry(self, request: Any, replays: int) -> None:
        if request is not None:
            # Celery copies a request's headers to every retry: ours, the body's and autoretry_for's.
            request.headers = {**(request.headers or {}), REPLAYS: replays}

    def task_id(self, request: Any) -> str:
        return str(getattr(request, "id", None) or "")

    def keys(self, request: Any) -> list[Any]:
        # Of the delivery just before: Celery copies the header to retries of the body's own, too, and those mean it.
        headers = cast(Any, getattr(request, "headers", None) or {})
        try:
            retries, sent = headers.get(KEYS)
            return [[str(part) for part in each] for each in sent if len(each) == 3 and retries == request.retries]
        except (TypeError, ValueError):
            return []

    def carry_keys(self, request: Any, sent: Sequence[Any]) -> None:
        if request is not None and sent:
            carried = [self.retries(request) + 1, [list(each) for each in sent]]
            request.headers = {**(request.headers or {}), KEYS: carried}

    def no_broker(self, request: Any, error: BaseException) -> str:
        task = self._task
        if request is None or request.called_directly:
            return "it was called directly, without a broker to retry through"
        if request.is_eager or task.app.conf.task_always_eager:
            return "it runs eagerly, without a broker to retry through"
        if not self._autoretries(error):
            return ""
        if self.runs_again(request, error):
            return "the task's autoretry_for handles this error"
        return "the task's autoretry_for lists this error, and its retries are used up"

    def _autoretries(self, error: BaseException) -> bool:
        wanted: Any = tuple(getattr(self._task, "autoretry_for", ()))
        unwanted: Any = tuple(getattr(self._task, "dont_autoretry_for", ()))
        return isinstance(error, wanted) and not isinstance(error, unwanted)

    def runs_again(self, request: Any, error: BaseException) -> str:
        if request is None or request.called_directly or not self._autoretries(error):
            return ""
        task = self._task
        # As celery.app.autoretry and Task.retry() count.
        most = getattr(task, "override_max_retries", (getattr(task, "retry_kwargs", None) or {}).get("max_retries"))
        most = task.max_retries if most is None else most
        if most is not None and self.retries(request) >= most:
            return ""
        return "Celery runs it again: the task's autoretry_for lists this error"

    def allowed(self, request: Any, elapsed: float) -> float | None:
        if request is None or request.called_directly:
            return None
        task = self._task
        # _limits() inlined: this runs for every task with a limit.
        hard, soft = request.timelimit or (None, None)
        hard, soft = hard or task.time_limit, soft or task.soft_time_limit
        if not (hard and soft):
            of_worker = worker_limits(task.app)
            hard, soft = hard or of_worker[0], soft or of_worker[1]
        if not hard and not soft and request.expires is None:
            return None
        margin = self._margin
        if margin is None:
            # Kept: a lookup in Celery's settings takes as long as lending a connection.
            margin = self._margin = read_setting(task.app.conf, "deadline_margin", DEADLINE_MARGIN)
        expires_in = None if request.expires is None else self.expires_in(request)
        # The limits count from the start of the task, expires_in from now.
        return seconds_allowed([hard, soft, None if expires_in is None else elapsed + expires_in], margin)

    def _limits(self, request: Any) -> tuple[float | None, float | None]:
        hard, soft = getattr(request, "timelimit", None) or (None, None)
        of_worker = worker_limits(self._task.app)
        return hard or self._task.time_limit or of_worker[0], soft or self._task.soft_time_limit or of_worker[1]

    def expires_in(self, request: Any) -> float | None:
        expires = getattr(request, "expires", None)
        return None if expires is None else _seconds_until(expires)

    def visibility(self) -> float | None:
        return _visibility_timeout(self._task.app)

    def time_limit_exceeded(self, request: Any) -> Exception:
        hard, soft = self._limits(request)
        error: Exception = TimeLimitExceeded(hard) if hard and not soft else SoftTimeLimitExceeded(soft)
        return error

    def retry(self, request: Any, error: BaseException, delay: float) -> Exception:
        # Not Task.retry(): it counts against the task's own max_retries and, with autoretry_for, keeps a max_retries
        # argument for later calls.
        signature = self._task.signature_from_request(request, countdown=delay, retries=self.retries(request) + 1)
        if not has_left(request.id, signature.apply_async):
            raise NotSent
        retry: Exception = Retry(exc=error, when=delay, is_eager=False, sig=signature)
        return retry


def _own_max_retries(task: Any) -> int | None:
    """Return the ``max_retries`` that a task or its base says; None for Celery's default, and for no limit."""
    for owner in (task, *type(task).__mro__):
        if owner is Task:
            break
        if "max_retries" in vars(owner):
            most = vars(owner)["max_retries"]
            return max(0, int(most)) if isinstance(most, (int, float)) else None
    return None


def _seconds_until(expires: Any) -> float | None:
    if isinstance(expires, str):
        try:
            expires = maybe_iso8601(expires)
        except ValueError:
            return None
    if not isinstance(expires, datetime):
        return None
    if expires.tzinfo is None:
        expires = expires.replace(tzinfo=timezone.utc)
    seconds: float = (expires - datetime.now(timezone.utc)).total_seconds()
    return seconds


#: Default visibility timeout of each broker, in seconds, by kombu's transport name. A message that waits longer in a
#: worker, for its countdown, is delivered a second time (Celery documentation, "Visibility timeout").
VISIBILITY_TIMEOUTS = {"redis": 3600.0, "rediss": 3600.0, "sentinel": 3600.0, "sqs": 1800.0}


def check_times(app: Any) -> list[str]:
    """Return a warning for each task of ``app`` whose times conflict with its broker's or its worker's.

    - A retry delay or time limit above the broker's visibility timeout: the broker would deliver the task twice.
    - A hard limit below the worker's soft limit: Celery starts the hard limit's timer after the soft limit's, and
      enforces it late.
    """
    visibility = _visibility_timeout(app)
    hard_of_worker, soft_of_worker = worker_limits(app)
    warnings = []
    for name, task in sorted(app.tasks.items()):
        if not hasattr(task, "replay"):
            continue
        policy = TaskTerms(task).policy
        hard, soft = task.time_limit or hard_of_worker, task.soft_time_limit or soft_of_worker
        waits = {"a retry may wait": 0.0 if policy is None else policy.longest_delay, "it may run for": hard or soft}
        for what, seconds in waits.items():
            if visibility is not None and seconds and seconds > visibility:
                warnings.append(
                    f"{name}: {what} {seconds:g} s, longer than the broker's visibility timeout of {visibility:g} s, "
                    "and the task would be delivered twice. Lower it, or raise visibility_timeout in "
                    "broker_transport_options"
                )
        if task.time_limit and soft_of_worker and not task.soft_time_limit and task.time_limit < soft_of_worker:
            warnings.append(
                f"{name}: its time_limit of {task.time_limit:g} s is below the worker's soft limit of "
                f"{soft_of_worker:g} s and will be enforced late: set a soft_time_limit on the task too"
            )
    return warnings


def _visibility_timeout(app: Any) -> float | None:
    default = VISIBILITY_TIMEOUTS.get(str(app.connection_for_write().transport_cls).lower())
    if default is None:
        return None
    return float((app.conf.broker_transport_options or {}).get("visibility_timeout", default))
