"""Fork safety of open connections.

A child must neither use its parent's connections nor close them: a clean close sends a farewell on a socket that the
parent still uses. So before any user code runs, the child points every inherited descriptor at the null device
(``dup2``) and keeps the owning objects referenced for ever, so that no finalizer runs.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from workerpools._process.descriptors import is_socket

__all__ = ["Inheritable", "afterwards", "guard"]


class Inheritable(Protocol):
    """An owner of descriptors that a forked child must not use."""

    def pin(self) -> object:
        """Return strong references to the objects that a child must not finalize. Called in the parent."""

    def discard(self) -> tuple[object, Sequence[int]]:
        """Forget all inherited state; return the objects to keep for ever, and their descriptors.

        Called in the child. Must not take a lock that a thread of the parent may have held.
        """
        ...


_guarded: dict[int, weakref.ref[Any]] = {}
_pins: dict[int, object] = {}
_afterwards: list[Callable[[], object]] = []
_install_lock = threading.Lock()
_installed = False


def guard(owner: Inheritable) -> None:
    """Discard the state that ``owner`` inherits, in every later child of this process.

    Args:
        owner: Held weakly: guarding does not keep it alive.
    """
    _install()
    key = id(owner)
    _guarded[key] = weakref.ref(owner, lambda _: _guarded.pop(key, None))


def afterwards(function: Callable[[], object]) -> None:
    """Call ``function`` once all inherited descriptors point at the null device; for :meth:`Inheritable.discard`."""
    _afterwards.append(function)


def _install() -> None:
    global _installed
    with _install_lock:
        if not _installed:
            # Imported late: processes without resources never pay for it. Before the fork: a child must not import.
            from ctypes import py_object, pythonapi

            def in_child() -> None:
                # Interpreter shutdown clears modules: one leaked reference keeps the values alive beyond that.
                pythonapi.Py_IncRef(py_object(_after_in_child()))

            os.register_at_fork(before=_before_in_parent, after_in_parent=_after_in_parent, after_in_child=in_child)
            _installed = True


def _owners() -> list[Any]:
    # list() of a dict's values is atomic: other threads may add owners meanwhile.
    return [owner for ref in list(_guarded.values()) if (owner := ref()) is not None]


def _before_in_parent() -> None:
    # In the child, CPython frees the thread-locals of all other threads BEFORE it runs the hooks. A checked-out
    # connection held only by such a thread would be finalized there, and send ROLLBACK on the parent's socket.
    _pins[threading.get_ident()] = [owner.pin() for owner in _owners()]


def _after_in_parent() -> None:
    _pins.pop(threading.get_ident(), None)


def _after_in_child() -> object:
    """Discard all inherited values; return the objects that this process must never finalize."""
    global _install_lock
    _install_lock = threading.Lock()
    kept: list[object] = [dict(_pins)]
    descriptors: list[int] = []
    for owner in _owners():
        value, filenos = owner.discard()
        kept.append(value)
        descriptors.extend(filenos)
    _point_at_null(descriptors)
    functions, _afterwards[:] = list(_afterwards), ()
    for function in functions:
        function()
    _pins.clear()
    return kept


def _point_at_null(descriptors: Iterable[int]) -> None:
    # A descriptor closed behind its owner's back may be another file by now.
    sockets = [fd for fd in dict.fromkeys(descriptors) if is_socket(fd)]
    if not sockets:
        return
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        # Out of descriptors: close one of the inherited ones to make room.
        os.close(sockets[0])
        try:
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            # The limit is below all of them. Closed, they are out of reach, too.
            for fd in sockets[1:]:
                os.close(fd)
            return
    for fd in sockets:
        if fd != null:
            os.dup2(null, fd, inheritable=False)
    if null not in sockets:
        os.close(null)
