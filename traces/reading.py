"""What reading somebody's trace gives: the value, and an account of every row that is not in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from plans.errors import Fault, InvalidInput

__all__ = ["MAX_REJECTED_RATIO", "Read", "Rejections"]

MAX_REJECTED_RATIO = 0.01
"""Share of rejected rows above which a file is refused, unless the caller says otherwise."""

_SHOWN = 5

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Read(Generic[Value]):
    """A value read from files, and what was left out of it.

    Attributes:
        value: What was read.
        rows: Rows (for a wide file: cells) that the files hold, rejected ones included.
        rejected: How many of them were rejected.
        reasons: Number of rejected rows by reason.
        first: The first few rejected rows, each with its file and line.
        notes: What else the reader decided, one sentence each; for people.
    """

    value: Value
    rows: int
    rejected: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    first: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()


class Rejections:
    """Collects rejected rows while a reader works, and decides at the end whether there are too many.

    Args:
        unit: What is counted, in the plural.
    """

    def __init__(self, unit: str = "rows") -> None:
        self._unit = unit
        self._reasons: Counter[str] = Counter()
        self._first: list[Fault] = []

    def add(self, fault: Fault, count: int = 1) -> None:
        """Count ``count`` rows (or cells) rejected for what ``fault`` says."""
        column = fault.field.partition("[")[0]
        reason = f"{column}: expected {fault.expected}" if column else f"expected {fault.expected}"
        self._reasons[reason] += count
        if len(self._first) < _SHOWN:
            self._first.append(fault)

    @property
    def full(self) -> bool:
        """Whether further faults are only counted, no longer shown."""
        return len(self._first) >= _SHOWN

    @property
    def total(self) -> int:
        """Number of rejected rows so far."""
        return self._reasons.total()

    def read(
        self, value: Value, *, where: str, rows: int, max_rejected_ratio: float, notes: tuple[str, ...] = ()
    ) -> Read[Value]:
        """Return the account of a finished read.

        Raises:
            InvalidInput: More than ``max_rejected_ratio`` of the rows were rejected.
        """
        self.check(where=where, rows=rows, max_rejected_ratio=max_rejected_ratio)
        return Read(
            value=value,
            rows=rows,
            rejected=self.total,
            reasons=dict(self._reasons),
            first=tuple(sorted(self._first, key=lambda fault: (fault.where, fault.line or 0))),
            notes=notes,
        )

    def check(self, *, where: str, rows: int, max_rejected_ratio: float) -> None:
        """Refuse a file with too many rejected rows.

        Raises:
            InvalidInput: More than ``max_rejected_ratio`` of ``rows`` were rejected; shows the first few.
        """
        if not self.total or self.total <= max_rejected_ratio * rows:
            return
        summary = Fault(
            where=where,
            found=f"{self.total} of {rows} {self._unit} rejected",
            expected=f"at most {max_rejected_ratio:.2%}",
            remedy=f"repair the {self._unit} below, or allow a higher ratio of rejected {self._unit}",
        )
        raise InvalidInput([summary, *sorted(self._first, key=lambda fault: (fault.where, fault.line or 0))])
