"""What an adapter or an exporter says where the library that it is for is not installed."""

from __future__ import annotations

__all__ = ["explained"]


def explained(error: ModuleNotFoundError, module: str, library: str, extra: str) -> ModuleNotFoundError:
    """Return the error to raise instead of ``error``: one that says what to install.

    Args:
        error: What importing ``library`` raised.
        module: The module of ours that needs it.
        library: The top-level module that was imported.
        extra: The extra that brings it.

    Returns:
        ``error`` itself where something else is missing, such as what the library needs in its turn.
    """
    if error.name != library:
        return error
    return ModuleNotFoundError(
        f"{module} needs {library}: pip install 'workerpools[{extra}]'", name=error.name, path=error.path
    )
