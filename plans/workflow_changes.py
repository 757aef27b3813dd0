"""Where workflows differ between two documents: by name, and edge by edge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from plans.service import Workflow

__all__ = ["WorkflowChange", "compare_workflows"]

ABSENT = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowChange:
    """One thing that differs between two lists of workflows.

    Attributes:
        workflow: Its name.
        part: The field or edge, as ``slo.deadline_s`` or ``edge detect -> read``; empty where all of it comes or goes.
        before: What it was; "none" where it was not there.
        after: What it is; "none" where it is not there any more.
    """

    workflow: str
    part: str
    before: str
    after: str

    @property
    def subject(self) -> str:
        """What differs, in words."""
        return f"workflow {self.workflow}" + (f", {self.part}" if self.part else "")


def compare_workflows(before: Sequence[Workflow], after: Sequence[Workflow]) -> tuple[WorkflowChange, ...]:
    """Return what differs, by name; nothing where the same workflows stand in another order."""
    old, new = ({workflow.name: workflow for workflow in workflows} for workflows in (before, after))
    return tuple(
        WorkflowChange(workflow=name, part=part, before=was, after=becomes)
        for name in sorted(old.keys() | new.keys())
        for part, was, becomes in _compared(old.get(name), new.get(name))
    )


def _compared(old: Workflow | None, new: Workflow | None) -> Iterator[tuple[str, str, str]]:
    if old is None or new is None:
        yield "", _in_short(old), _in_short(new)
        return
    was, becomes = _parts(old), _parts(new)
    for part in dict.fromkeys((*was, *becomes)):
        if was.get(part) != becomes.get(part):
            yield part, was.get(part, ABSENT), becomes.get(part, ABSENT)
    if old != new and was == becomes:  # a switch takes the first edge that fits
        yield "order of edges", ", ".join(_edges(old)), ", ".join(_edges(new))


def _parts(workflow: Workflow) -> dict[str, str]:
    """Return what a workflow says, by field and edge; fields at their defaults count as said."""
    slo = {f"slo.{field}": str(value) for field, value in workflow.slo.model_dump(mode="json").items()}
    joins = {f"joins.{name}": join for name, join in workflow.joins.items()}
    return slo | {"affinity": workflow.affinity} | joins | _edges(workflow)


def _edges(workflow: Workflow) -> dict[str, str]:
    seen: Counter[str] = Counter()
    found = {}
    for edge in workflow.edges:
        name = f"edge {edge.source} -> {edge.target}"
        seen[name] += 1
        said = edge.model_dump(mode="json", exclude={"source", "target"})
        numbered = name if seen[name] == 1 else f"{name} ({seen[name]})"
        found[numbered] = ", ".join(f"{field} {value}" for field, value in said.items() if value is not None)
    return found


def _in_short(workflow: Workflow | None) -> str:
    if workflow is None:
        return ABSENT
    return f"{', '.join(_edges(workflow))} within {workflow.slo.deadline_s:g} s"
