"""Every code: what ``--explain`` and the table in the documentation are made from."""

from __future__ import annotations

from workerpools._check import budget, fork_hazards, settings, silences, source
from workerpools._check.findings import Code

__all__ = ["ALL"]

#: By code.
ALL: dict[str, Code] = {
    each.code: each for family in (silences, fork_hazards, source, settings, budget) for each in family.CODES
}
