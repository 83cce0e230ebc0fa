"""What a check found, to be printed or read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Findings = dict[str, Any]


@dataclass
class CheckReport:
    """What a check found; printed, it is a line each, the last of them the verdict: OK (with warnings), or a problem.

    Attributes:
        findings: by name, plain values.
        problems: what a run would suffer from, a line each.
        warnings: what may be as wanted.
    """

    findings: Findings = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{key}: {_readable(value)}" for key, value in self.findings.items()]
        lines += [f"WARNING: {warning}" for warning in self.warnings]
        count = len(self.warnings)
        verdict = f"OK, with {count} warning{'s' * (count > 1)}" if count else "OK"
        return "\n".join([*lines, *([f"PROBLEM: {problem}" for problem in self.problems] or [verdict])])

    def as_dict(self) -> dict[str, Any]:
        """Findings, `problems` and `warnings` in one."""
        return {**self.findings, "problems": self.problems, "warnings": self.warnings}


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_readable, value))
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
