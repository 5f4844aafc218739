"""What a check finds, and what its code means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Code", "Finding", "Severity", "document", "exit_status"]

Severity = Literal["error", "warning", "hint"]

_STATUS: dict[Severity, int] = {"hint": 0, "warning": 1, "error": 2}


@dataclass(frozen=True)
class Code:
    """One kind of finding.

    Attributes:
        code: Stable, ``WP`` and three digits; the first one names the family.
        severity: What follows from it: a bug in production, a risk, or nothing but a cost.
        title: What it is, in a few words.
        why: Why it matters.
        fix: What to do instead.
        example: A line or two of code, or of settings, that it finds.
    """

    code: str
    severity: Severity
    title: str
    why: str
    fix: str
    example: str

    def at(self, where: str, what: str, severity: Severity | None = None) -> Finding:
        """Return a finding of this kind.

        Args:
            where: ``file:line``, ``module.name``, or the name of a setting or a task.
            what: What was found there, in one sentence without secrets.
            severity: Where it is not that of the kind.
        """
        return Finding(self.code, severity or self.severity, where, what, self.why, self.fix)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or may be.

    Attributes:
        code: The code of its kind, which ``celery pools check --explain`` explains.
        severity: ``error``, ``warning`` or ``hint``.
        where: ``file:line``, ``module.name``, or the name of a setting or a task.
        what: What was found there.
        why: Why it matters.
        fix: What to do instead.
    """

    code: str
    severity: Severity
    where: str
    what: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.code} {self.severity}: {self.what}"


def exit_status(findings: Iterable[Finding]) -> int:
    """Return 0 without findings or for hints alone, 1 for warnings, 2 for errors."""
    return max((_STATUS[each.severity] for each in findings), default=0)


def document(findings: Iterable[Finding]) -> dict[str, Any]:
    """Return the findings as a JSON document."""
    found = [asdict(each) for each in findings]
    return {"version": 1, "findings": found}
