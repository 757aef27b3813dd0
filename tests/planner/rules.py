"""Whether a plan keeps every hard constraint, from its documents alone, and with the planner's own margins."""

from __future__ import annotations

import pytest

from foreplan.planning import verify
from planner.problem import Problem, offered_rps
from plans.plan import Plan


def assert_sound(plan: Plan, problem: Problem) -> None:
    """Fail unless ``plan`` passes the independent checker, keeps the headroom and serves nobody beyond the demand."""
    assert verify(plan, problem.cluster, problem.services, problem.profiles, problem.demand) == ()
    used: dict[tuple[str, int], int] = {}
    for group in plan.groups:
        for entry in group.loadout:
            for gpu, size in zip(group.gpus, entry.memory_bytes, strict=True):
                used[group.node, gpu] = used.get((group.node, gpu), 0) + size
    for (node, _), size in used.items():
        limit = problem.cluster.gpu_type_of(node).memory_bytes * (1 - problem.settings.headroom_ratio)
        assert size <= limit * (1 + 1e-9)
    served: dict[str, float] = {}
    for group in plan.groups:
        for entry in group.loadout:
            served[entry.service] = served.get(entry.service, 0.0) + entry.rate_rps
    weighted = 0.0
    for service in problem.services.services:
        offered = offered_rps(service, problem.demand.of(service.name), problem.settings.quantile)
        assert served.get(service.name, 0.0) <= offered * (1 + 1e-6) + 1e-9
        weighted += service.weight * served.get(service.name, 0.0)
        routes = plan.routes.get(service.name, ())
        assert not routes or sum(route.weight for route in routes) == pytest.approx(1.0, abs=1e-12)
        missing = sum(each.rate_rps for each in plan.unserved if each.service == service.name)
        assert served.get(service.name, 0.0) + missing == pytest.approx(offered, rel=1e-5, abs=1e-6)
    assert weighted == pytest.approx(plan.solver.objective, rel=1e-5, abs=1e-6)
    assert plan.solver.bound >= plan.solver.objective * (1 - 1e-9)
