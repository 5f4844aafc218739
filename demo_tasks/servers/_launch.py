"""Become a server: drop privileges, tie the process to its parent's life, then exec the server's program.

This file is run as a script in a fresh interpreter, so that none of this happens between fork and exec of a
process that may have threads and held locks. It imports nothing of this package. Arguments:

    PARENT SIGNAL IDENTITY DIRECTORY PROGRAM [ARGUMENT ...]

PARENT is the process id that must still be the parent; SIGNAL is what the kernel sends when the parent dies;
IDENTITY is `same`, `UID:GID`, or `userns:UID:GID`; DIRECTORY becomes the working directory. The exit status
is 126 when access is denied, 127 for any other failure to start.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

DENIED = 126
FAILED = 127

_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER = 0x10000000


# Everything is imported and loaded while the process can still read the standard library: it may lie in
# root's home.
_LIBC = ctypes.CDLL(None, use_errno=True)


def _libc_call(name: str, *arguments: int) -> None:
    if getattr(_LIBC, name)(*(ctypes.c_ulong(argument) for argument in arguments)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _enter_user_namespace(uid: int, gid: int) -> None:
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    _libc_call("unshare", _CLONE_NEWUSER)
    # The kernel accepts a group map from an unprivileged writer only after setgroups() is given up.
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{uid} {outer_uid} 1")
    _write("/proc/self/gid_map", f"{gid} {outer_gid} 1")


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _assume(identity: str) -> None:
    if identity == "same":
        return
    *kind, uid, gid = identity.split(":")
    if kind == ["userns"]:
        _enter_user_namespace(int(uid), int(gid))
    else:
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))


def _follow_parent(parent: int, signal_number: int) -> None:
    # A shell without job control starts what it runs in the background with both ignored, and exec keeps that: a
    # program that sets no handler of its own would outlive its parent.
    for ignored in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(ignored, signal.SIG_DFL)
    if sys.platform == "linux":
        _libc_call("prctl", _PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    # A parent that died before prctl sends no signal any more; this process has another parent by then.
    if os.getppid() != parent:
        sys.exit(FAILED)


def main(argv: list[str]) -> None:
    """Carry out the steps and exec the program; only a failure returns to the interpreter."""
    parent, signal_number, identity, directory, program = argv[:5]
    try:
        _assume(identity)
        os.chdir(directory)
        # Last, because a change of credentials clears the parent-death signal.
        _follow_parent(int(parent), int(signal_number))
        os.execv(program, argv[4:])
    except PermissionError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(DENIED)
    except OSError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(FAILED)


if __name__ == "__main__":
    main(sys.argv[1:])
