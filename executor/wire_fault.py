"""What is wrong with a message, in the words of a fault."""

from __future__ import annotations

from plans.errors import Fault

__all__ = ["fault"]


def fault(field: str, found: object, expected: str) -> Fault:
    """Return the fault at ``field`` of a message, which has neither file nor line."""
    return Fault(field=field, found=str(found), expected=expected)
