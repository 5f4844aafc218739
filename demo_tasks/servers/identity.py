"""Which user a server runs as that refuses to run as root."""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from demo_tasks.servers.command import DENIED, Command, Identity
from demo_tasks.servers.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# The number inside the user namespace; any will do that is not 0.
_NAMESPACE_ID = 1000
_NOBODY_ID = 65534
_PROBE_SECONDS = 30.0


def unprivileged_identity(program: Path, directory: Path, environment: Mapping[str, str]) -> Identity:
    """Choose the user for a server that refuses to run as root, and give it the server's directory.

    A normal user runs the server as themselves. Root hands it to `nobody`; where `nobody` may not reach the
    program or the directory, because either lies in root's home for one, the server runs in a user namespace:
    still as root for the files' permissions, but as a normal user in its own eyes.

    Args:
        program: The server's program; it must exit with status 0 when run with `--version`.
        directory: The server's directory.
        environment: The environment of the server.

    Returns:
        The identity to run as; the directory belongs to its user.

    Raises:
        ServerError: Root can run the program in neither way.
    """
    if os.geteuid() != 0:
        return Identity()
    log_path = directory.with_name(f"{directory.name}-identity.log")
    for identity in _candidates():
        try:
            os.chown(directory, *(identity.owner or (os.geteuid(), os.getegid())))
        except PermissionError as error:
            # Root without its capabilities, as in a container that dropped them.
            log_path.write_text(str(error))
            continue
        command = Command((str(program), "--version"), directory, environment, identity)
        with log_path.open("wb") as log:
            status = command.run(log, _PROBE_SECONDS)
        if status == 0:
            return identity
        # Anything but a refusal would fail in the same way for the next candidate.
        if status != DENIED:
            break
    reason = log_path.read_text(errors="replace").strip()
    raise ServerError(
        f"Root can run {program} neither as the user nobody nor in a user namespace ({reason}): run as a "
        "normal user, or install the Python environment outside of root's home directory."
    )


def _candidates() -> Iterator[Identity]:
    try:
        entry = pwd.getpwnam("nobody")
        uid, gid = entry.pw_uid, entry.pw_gid
    except KeyError:
        uid = gid = _NOBODY_ID
    yield Identity(f"{uid}:{gid}", owner=(uid, gid))
    if sys.platform == "linux":
        yield Identity(f"userns:{_NAMESPACE_ID}:{_NAMESPACE_ID}")
