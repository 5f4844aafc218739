"""A private temporary directory for one run, swept by the next run when this one dies.

The directory's owner holds a lock on a file in it. The kernel lets go of the lock whenever and however the
owner ends, so a directory whose lock is free belongs to nobody any more; unlike a process id, a lock cannot
be mistaken for that of a later process or of a process in another container that shares the temporary
directory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from demo_tasks.servers.errors import ServerError

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

PREFIX = "workerpools-"
_OWNER_FILE = "owner"
# A directory without a finished owner file is being made by a run that starts at this moment, or was left by
# one that died within its first milliseconds.
_UNFINISHED_SECONDS = 3600.0


class Workspace:
    """One private directory for everything that a run's servers write.

    Creating a workspace removes the directories of this user's earlier runs that ended without removing
    theirs.

    Args:
        parent: Where to create it; the system's temporary directory by default.
    """

    def __init__(self, parent: str | os.PathLike[str] | None = None) -> None:
        base = Path(parent) if parent is not None else Path(tempfile.gettempdir())
        _sweep(base)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        self._pid = os.getpid()
        self._lock: int | None = _claim(self.path / _OWNER_FILE)
        if os.geteuid() == 0:
            # A server that gave up root must be able to reach its own directory inside; it cannot list this
            # one.
            self.path.chmod(0o711)

    def __repr__(self) -> str:
        state = "open" if self._lock is not None else "closed"
        return f"<Workspace {str(self.path)!r} {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def directory(self, name: str) -> Path:
        """Create a directory for one server.

        Args:
            name: The server's name, which must be new in this workspace.

        Returns:
            The path of the directory, accessible to this user only.

        Raises:
            ServerError: The workspace is closed, or a server of that name has its directory here already.
        """
        if self._lock is None:
            raise ServerError(f"The workspace {self.path} is closed.")
        path = self.path / name
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            message = f"Another server of this run is named {name!r}: give this one another name."
            raise ServerError(message) from None
        return path

    def close(self) -> None:
        """Remove the directory; calling it again, or in a forked child, does nothing."""
        if self._lock is None or os.getpid() != self._pid:
            return
        lock, self._lock = self._lock, None
        try:
            _remove(self.path)
        finally:
            os.close(lock)


def _claim(owner_file: Path) -> int:
    lock = os.open(owner_file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Written under the lock: a sweeper that gets the lock and reads nothing knows that the owner is still
        # starting.
        os.write(lock, f"{os.getpid()}\n".encode())
    except BaseException:
        os.close(lock)
        raise
    return lock


def _sweep(base: Path) -> None:
    for path in base.glob(f"{PREFIX}*"):
        try:
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                _sweep_one(path, status.st_mtime)
        except OSError:
            # Another run sweeps the same directory, or its owner removes it.
            continue


def _sweep_one(path: Path, modified: float) -> None:
    try:
        lock = os.open(path / _OWNER_FILE, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        if time.time() - modified > _UNFINISHED_SECONDS:
            _remove(path)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.read(lock, 1) or time.time() - modified > _UNFINISHED_SECONDS:
            _remove(path)
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    # A server that is on its last breath may still write: try again before leaving the rest to a later sweep.
    # The owner file goes last, because a directory without it looks like one that is being made.
    for _ in range(5):
        for entry in path.iterdir():
            if entry.name != _OWNER_FILE:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
        if [entry.name for entry in path.iterdir()] in ([], [_OWNER_FILE]):
            break
        time.sleep(0.1)
    else:
        return
    shutil.rmtree(path, ignore_errors=True)
