"""Applying a plan to some nodes only: the live plan with those nodes' part replaced."""

from __future__ import annotations

import math
from collections.abc import Collection

from plans.errors import InvalidInput
from plans.plan import Group, Plan, Prior, Route

__all__ = ["is_part_of", "targeted"]

_TARGET_OF = "target_of"
"""Setting of a plan that is another one on some nodes: the placement digest of that."""


def is_part_of(live: Plan, plan: Plan) -> bool:
    """Say whether ``live`` is what `targeted` made of ``plan``: the rest of it may then follow."""
    return live.settings.get(_TARGET_OF) == plan.placement_digest


def targeted(plan: Plan, live: Plan | None, nodes: Collection[str], prior: Prior | None) -> Plan:
    """Return ``plan`` on ``nodes`` and ``live`` on all others, as one plan.

    A service's routes go to its groups in both parts, in proportion to the rates that the parts plan for them.
    Predictions and the solver's certificate are those of neither plan, so they are left out: the gap is 1 and says
    that nothing is proven.

    Args:
        plan: Taken on ``nodes``.
        live: Taken elsewhere; None when nothing runs.
        nodes: Names of nodes.
        prior: Of the plan to be made: what is live.

    Raises:
        InvalidInput: No node is named.
    """
    if not nodes:
        raise InvalidInput.of("at least one node", where="--target", found="none")
    groups = tuple(
        group
        for source, ours in ((plan, True), (live, False))
        for group in (source.groups if source else ())
        if (group.node in nodes) is ours
    )
    services = dict.fromkeys(entry.service for group in groups for entry in group.loadout)
    solver = plan.solver.model_copy(update={"name": "target", "status": "feasible", "gap": 1.0})
    return Plan.model_validate(
        {name: getattr(plan, name) for name in Plan.model_fields}
        | {
            "groups": groups,
            "routes": {service: _routes(service, groups) for service in services},
            "predicted": (),
            "unserved": (),
            "transition": (),
            "shadow_prices": {},
            "solver": solver,
            "settings": {**plan.settings, _TARGET_OF: plan.placement_digest},
            "prior": prior,
            "warnings": (*plan.warnings, f"only {', '.join(sorted(nodes))} follow the plan; the rest runs as before"),
        }
    )


def _routes(service: str, groups: Collection[Group]) -> tuple[Route, ...]:
    rates = {group.id: entry.rate_rps for group in groups for entry in group.loadout if entry.service == service}
    total = math.fsum(rates.values())
    if total <= 0:
        return tuple(Route(group=group, weight=1 / len(rates)) for group in rates)
    return tuple(Route(group=group, weight=rate / total) for group, rate in rates.items() if rate > 0)
