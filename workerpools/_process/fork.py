"""What happens to open connections when the process forks: every line about fork, and nothing else.

A child must not use its parent's connections, and must not close them either: closing says goodbye on a socket that
the parent still uses. So the child, before any user code runs, points every inherited descriptor at the null device
(``dup2``), and keeps the objects that own them referenced for ever, so that no finalizer runs.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from workerpools._process.descriptors import is_socket

__all__ = ["Inheritable", "guard"]


class Inheritable(Protocol):
    """Something that owns descriptors that a forked child must not use."""

    def pin(self) -> object:
        """Return strong references to what must not be finalized in a child. Called in the parent."""

    def discard(self) -> tuple[object, Sequence[int]]:
        """Forget everything inherited; return the objects to keep for ever, and their descriptors.

        Called in the child. Must not take a lock that another thread of the parent may have held.
        """
        ...


_guarded: dict[int, weakref.ref[Any]] = {}
_pins: dict[int, object] = {}
_install_lock = threading.Lock()
_installed = False


def guard(owner: Inheritable) -> None:
    """Have ``owner`` discard what it inherits, in every child that this process forks from now on.

    Args:
        owner: Held weakly: guarding does not keep it alive.
    """
    _install()
    key = id(owner)
    _guarded[key] = weakref.ref(owner, lambda _: _guarded.pop(key, None))


def _install() -> None:
    global _installed
    with _install_lock:
        if not _installed:
            # Where nothing is guarded nobody pays for it; a child must find it loaded.
            from ctypes import py_object, pythonapi

            def in_child() -> None:
                # An interpreter that ends normally clears its modules: one reference that nobody gives back keeps the
                # values beyond that, too.
                pythonapi.Py_IncRef(py_object(_after_in_child()))

            os.register_at_fork(before=_before_in_parent, after_in_parent=_after_in_parent, after_in_child=in_child)
            _installed = True


def _owners() -> list[Any]:
    # list() of a dict's values is one step of the interpreter: other threads may add owners meanwhile.
    return [owner for ref in list(_guarded.values()) if (owner := ref()) is not None]


def _before_in_parent() -> None:
    # CPython frees the thread-locals of all other threads in the child BEFORE it runs the child's hooks. A checked-out
    # connection that only such a thread holds would be finalized there, and send ROLLBACK on the parent's socket.
    _pins[threading.get_ident()] = [owner.pin() for owner in _owners()]


def _after_in_parent() -> None:
    _pins.pop(threading.get_ident(), None)


def _after_in_child() -> object:
    """Discard what was inherited; return what must never be finalized in this process."""
    global _install_lock
    _install_lock = threading.Lock()
    kept: list[object] = [dict(_pins)]
    descriptors: list[int] = []
    for owner in _owners():
        value, filenos = owner.discard()
        kept.append(value)
        descriptors.extend(filenos)
    _point_at_null(descriptors)
    _pins.clear()
    return kept


def _point_at_null(descriptors: Iterable[int]) -> None:
    # A number that was closed behind its owner's back may name a file of somebody else by now.
    sockets = [fd for fd in dict.fromkeys(descriptors) if is_socket(fd)]
    if not sockets:
        return
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        # The limit of open files is reached: give up one inherited descriptor to make room.
        os.close(sockets[0])
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in sockets:
        if fd != null:
            os.dup2(null, fd, inheritable=False)
    if null not in sockets:
        os.close(null)
