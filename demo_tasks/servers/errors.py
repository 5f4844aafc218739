"""The one error that the local servers raise."""

from __future__ import annotations


class ServerError(RuntimeError):
    """A local server could not be found, started, reached or stopped.

    The message is written for the person at the terminal: one sentence that says what is wrong and, where
    something is missing, what to install; after a failed start it is followed by the last lines of the
    server's log.
    """


class PortTakenError(ServerError):
    """A server could not bind its port because another process took the port first."""
