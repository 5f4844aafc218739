"""What the checks are asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workerpools._check.findings import Code

__all__ = ["Asked"]


@dataclass
class Asked:
    """What the checks are asked, and what they tell each other.

    Attributes:
        app: The app, with its tasks loaded.
        probe: Whether connections may be opened.
        codes: Every code.
        silenced: The codes left out at a place of the source, by ``file:line``; filled by who reads the source.
    """

    app: Any
    probe: bool
    codes: Mapping[str, Code]
    silenced: dict[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
