"""Which modules are the user's own, and what their files are called."""

from __future__ import annotations

import os
import sysconfig

__all__ = ["is_own", "shown"]

_INSTALLED = tuple(
    os.path.realpath(path) + os.sep
    for path in sorted({str(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
)


def is_own(name: str, path: str | None) -> bool:
    """Return whether a module is the user's own, not the standard library's, an installed one or ours.

    Args:
        name: Its dotted name.
        path: Its file.
    """
    if path is None or not path.endswith(".py") or name.partition(".")[0] == "workerpools":
        return False
    real = os.path.realpath(path)
    return not real.startswith(_INSTALLED) and "site-packages" not in real and "dist-packages" not in real


def shown(path: str) -> str:
    """Return a file as findings name it: relative to the working directory where it is below that."""
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative
