"""What can go wrong, as one tree that every package uses.

Infeasible and out-of-time are results, never exceptions. Exceptions are::

    ForeplanError                 anything this project raises on purpose
    ├── InvalidInput              a document, trace, flag or request is wrong; carries *all* faults found
    ├── BadStoredData             a file that Foreplan itself wrote is damaged
    ├── StalePlan                 the cluster moved on since the plan was made
    ├── RemoteFailure             an agent or gateway failed or cannot be reached; says whether a retry can help
    └── ApplyRolledBack           an apply failed before commit and every node is back where it was

Any other exception is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ApplyRolledBack",
    "BadStoredData",
    "Fault",
    "ForeplanError",
    "InvalidInput",
    "RemoteFailure",
    "StalePlan",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong with an input.

    Attributes:
        where: File, flag or request that holds the fault; empty when it has no name.
        line: Line in that file, counted from 1, when known.
        field: Dotted path of the field, such as ``nodes[2].gpus.count``; empty for the whole input.
        found: What was found, as the user wrote it.
        expected: What would have been accepted, with its limit.
        remedy: What to do about it; empty when ``expected`` says it all.
    """

    where: str = ""
    line: int | None = None
    field: str = ""
    found: str = ""
    expected: str
    remedy: str = ""

    def __str__(self) -> str:
        place = ":".join(part for part in (self.where, str(self.line) if self.line else "") if part)
        text = ": ".join(part for part in (place, self.field) if part)
        found = f"found {self.found}, " if self.found else ""
        text = f"{text}: {found}expected {self.expected}" if text else f"{found}expected {self.expected}"
        return f"{text}; {self.remedy}" if self.remedy else text


class ForeplanError(Exception):
    """Root of the errors that Foreplan raises on purpose."""


class InvalidInput(ForeplanError):
    """An input is wrong. All faults that could be found are in ``faults``."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        if not self.faults:
            raise ValueError("InvalidInput needs at least one fault")
        super().__init__("\n".join(str(fault) for fault in self.faults))

    @classmethod
    def of(
        cls, expected: str, *, where: str | Path = "", field: str = "", found: object = "", remedy: str = ""
    ) -> InvalidInput:
        """Return the error for a single fault."""
        return cls([Fault(where=str(where), field=field, found=str(found), expected=expected, remedy=remedy)])


class BadStoredData(ForeplanError):
    """A file that Foreplan wrote cannot be read back."""

    def __init__(self, path: Path, problem: str, *, line: int | None = None) -> None:
        self.path = path
        self.line = line
        super().__init__(f"{path}{f':{line}' if line else ''}: {problem}")


class StalePlan(ForeplanError):
    """The plan was made for another state of the cluster than the live one."""


class RemoteFailure(ForeplanError):
    """A node or gateway failed, refused, or cannot be reached."""

    def __init__(self, peer: str, problem: str, *, retryable: bool) -> None:
        self.peer = peer
        self.problem = problem
        self.retryable = retryable
        super().__init__(f"{peer}: {problem}")


class ApplyRolledBack(ForeplanError):
    """An apply failed before its commit; every node that had staged anything dropped it again."""
