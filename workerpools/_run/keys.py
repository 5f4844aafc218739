"""The idempotency keys of a task's requests: what a run before sent under a key, a replay sends under the same one."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable
from typing import Any, NamedTuple

from workerpools._process.flows import flow

__all__ = ["Keys", "derive"]

#: The most requests whose keys are kept per delivery; later ones count as effects.
MAX_KEPT = 100

_NAMESPACE = uuid.UUID("6b6f1d0e-3b0c-5d0a-9a55-0c5a2a8b1d55")


def derive(task_id: str, task: str, name: str) -> str:
    """Return the key that stands for one act of one task, however often it runs.

    Args:
        task_id: The task's id.
        task: The task's name.
        name: The act's name.
    """
    return str(uuid.uuid5(_NAMESPACE, f"{len(task_id)}:{task_id}:{len(task)}:{task}:{name}"))


class _Sent(NamedTuple):
    place: str
    content: str
    key: str


class Keys:
    """The keys of the requests of one delivery.

    A key that is made in the body (``uuid4()``) is another one in each run, and would not keep the server from doing
    its request twice. So a request of a later run is sent under the key that the same request of a run before had.

    Args:
        earlier: What :attr:`sent` was in the delivery before, whose retry this one is.
    """

    def __init__(self, earlier: Iterable[Iterable[str]] = ()) -> None:
        #: Keys that are the same in every run.
        self.derived: set[str] = set()
        #: The place and the content of each request, as digests, and its key.
        self.sent: list[Any] = [_Sent(*each) for each in earlier]
        self._begin(again=bool(self.sent))

    def _begin(self, *, again: bool) -> None:
        # Which of them this run has sent again, under which key of its own, whether it is the first one, and in which
        # thread it sends.
        self._again: dict[int, str] = {}
        self._runs_again, self._flow = again, 0

    def run_again(self) -> None:
        """Begin another run of the body."""
        self._begin(again=True)

    def keep(self, place: str, content: bytes | None, key: str) -> str | None:
        """Return the key to send a request with; None if nothing makes sure that another run would send it again.

        Args:
            place: The request's method and URL.
            content: Its content; None if it is not known before it is sent.
            key: The key that the body gave it.
        """
        if key in self.derived:
            return key
        self._flow = self._flow or flow()
        if content is None or self._flow != flow():
            # The order of threads, and of tasks of the event loop, is another one in each run.
            return None
        place, digest = _digest(place.encode()), _digest(content)
        others = False
        for number, sent in enumerate(self.sent):
            if sent.place == place and key in (sent.key, self._again.get(number)):
                self._again[number] = key
                return str(sent.key)
        for number, sent in enumerate(self.sent):
            if sent.place == place and number not in self._again:
                if sent.content == digest:
                    self._again[number] = key
                    return str(sent.key)
                others = True
        if (self._runs_again and others) or len(self.sent) >= MAX_KEPT:
            # It may be one of the others, with another content.
            return None
        self._again[len(self.sent)] = key
        self.sent.append(_Sent(place, digest, key))
        return key


def _digest(content: bytes) -> str:
    # What is sent may be secret, and this travels in a message.
    return hashlib.sha256(content).hexdigest()[:32]
