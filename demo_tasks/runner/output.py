"""A standard output whose reader may go away."""

from __future__ import annotations

import os
from typing import Any, TextIO, cast

__all__ = ["patient"]


def patient(stream: TextIO | None) -> TextIO:
    """Return ``stream`` as one that drops what cannot be written any more.

    A reader that ends early (``| head``) or a terminal that is closed is no reason to leave servers behind.

    Args:
        stream: A standard stream; None, which Python makes of one that is closed, takes everything and keeps nothing.
    """
    if stream is None:
        return open(os.devnull, "w")
    return cast("TextIO", _Patient(stream))


class _Patient:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        # What is in the stream's buffer still is written when the interpreter ends, and must not fail there.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
