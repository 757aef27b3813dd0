"""Plans as files."""

from __future__ import annotations

from pathlib import Path

from plans.documents import read_document, write_document
from plans.plan import Plan

__all__ = ["read_plan", "write_plan"]


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        InvalidInput: The file is missing, damaged, of an unknown major version, or no consistent plan.
    """
    return read_document(path, Plan)


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan atomically, as indented JSON in the current format version."""
    write_document(path, plan)
