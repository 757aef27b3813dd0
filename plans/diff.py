"""What changes from one plan to another, as a value that can be shown, stored and applied.

The law: ``apply_diff(a, diff(a, b)) == b`` for any two plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from plans.plan import Group, LoadoutEntry, Plan, Route
from plans.workflow_changes import WorkflowChange, compare_workflows

__all__ = ["EntryChange", "PlanDiff", "RouteChange", "apply_diff", "diff"]

Action = Literal["create", "update", "delete"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryChange:
    """One service on one group before and after; None where it is not there."""

    group: str
    service: str
    before: LoadoutEntry | None
    after: LoadoutEntry | None

    @property
    def action(self) -> Action:
        """What happens to the replica, in terraform's words."""
        return "create" if self.before is None else "delete" if self.after is None else "update"

    @property
    def reloads(self) -> bool:
        """Whether weights have to be loaded: a new replica, or another variant."""
        return self.after is not None and (self.before is None or self.before.variant != self.after.variant)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteChange:
    """The routes of one service before and after; None where the service has none."""

    service: str
    before: tuple[Route, ...] | None
    after: tuple[Route, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDiff:
    """All that differs.

    Attributes:
        entries: Replicas that come, go or change, by group and service.
        groups: Groups to put in place whole (id to group), and to take away (id to None).
        routes: Services whose routes change.
        workflows: What changes in workflows; their new value is in ``record``.
        record: Other fields of the plan (predictions, solver, inputs, ...) that differ, with their new value.
    """

    entries: tuple[EntryChange, ...]
    groups: Mapping[str, Group | None]
    routes: tuple[RouteChange, ...]
    workflows: tuple[WorkflowChange, ...]
    record: Mapping[str, Any]

    @property
    def changes_placement(self) -> bool:
        """Whether anything would change on a node or a gateway."""
        return bool(self.groups or self.routes or "workflows" in self.record)


def diff(before: Plan, after: Plan) -> PlanDiff:
    """Return what turns ``before`` into ``after``."""
    old = {group.id: group for group in before.groups}
    new = {group.id: group for group in after.groups}
    groups = {name: new.get(name) for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)}
    entries = tuple(
        EntryChange(group=name, service=service, before=was, after=becomes)
        for name in groups
        for service, was, becomes in _paired(old.get(name), new.get(name))
        if was != becomes
    )
    routes = tuple(
        RouteChange(service=service, before=before.routes.get(service), after=after.routes.get(service))
        for service in sorted(before.routes.keys() | after.routes.keys())
        if before.routes.get(service) != after.routes.get(service)
    )
    record = {
        name: getattr(after, name)
        for name in Plan.model_fields
        if name not in ("groups", "routes") and getattr(before, name) != getattr(after, name)
    }
    workflows = compare_workflows(before.workflows, after.workflows)
    return PlanDiff(entries=entries, groups=groups, routes=routes, workflows=workflows, record=record)


def apply_diff(before: Plan, change: PlanDiff) -> Plan:
    """Return the plan that ``change`` makes of ``before``."""
    groups = {group.id: group for group in before.groups} | dict(change.groups)
    routes = dict(before.routes) | {route.service: route.after for route in change.routes}
    fields = {name: getattr(before, name) for name in Plan.model_fields} | dict(change.record)
    fields["groups"] = tuple(group for group in groups.values() if group is not None)
    fields["routes"] = {service: targets for service, targets in routes.items() if targets is not None}
    return Plan(**fields)


def _paired(old: Group | None, new: Group | None) -> Iterator[tuple[str, LoadoutEntry | None, LoadoutEntry | None]]:
    """Pair the entries of one group before and after. A group cut otherwise (tp, pp) keeps nothing."""
    before = {entry.service: entry for entry in old.loadout} if old else {}
    after = {entry.service: entry for entry in new.loadout} if new else {}
    recut = old is not None and new is not None and (old.tp, old.pp) != (new.tp, new.pp)
    for service in sorted(before.keys() | after.keys()):
        if recut and service in before and service in after:
            yield service, before[service], None
            yield service, None, after[service]
        else:
            yield service, before.get(service), after.get(service)
