"""From a placement to the plan document."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from planner.backend import Budget, solver
from planner.prediction import latency_model, predict
from planner.recourse import routed_in
from planner.space import Placed, Placement, PlanningSpace
from planner.tier import TierOutcome
from planner.unserved import unserved
from plans.cluster import Cluster
from plans.demand import Demand
from plans.documents import canonical_digest
from plans.plan import Contingency, Group, LoadoutEntry, Plan, Prior, Route, SolverReport, Tier
from plans.service import Services
from profiles.generation import token_rules
from profiles.library import ProfileLibrary

__all__ = ["Drafts", "assemble", "digests_of", "solver_report"]


def assemble(
    space: PlanningSpace,
    placement: Placement,
    report: SolverReport,
    *,
    shadow_prices: dict[str, float],
    warnings: tuple[str, ...],
    created_at: str,
    tool_version: str,
) -> Plan:
    """Return the plan of ``placement``; its transition is left empty, for `plans.transition` to fill."""
    problem = space.problem
    running = problem.current
    left_out = unserved(space, placement)
    predicted = predict(space, placement)
    offered = dict(zip(space.names, space.offered_rps, strict=True))
    notes = [*warnings, *_warnings(space, placement)]
    notes += [
        f"{each.service}: {each.rate_rps:.4g} of {offered[each.service]:.4g} rps are "
        f"{'not served' if each.rate_rps >= offered[each.service] else 'beyond the planned utilisation'} "
        f"({each.reason}): {each.detail}"
        for each in left_out
    ]
    return Plan(
        tool_version=tool_version,
        created_at=created_at,
        inputs=digests_of(problem.cluster, problem.services, problem.profiles, problem.demand),
        prior=_prior(running),
        solver=report,
        groups=_groups(space, placement),
        routes=_routes(space, placement),
        predicted=predicted,
        shadow_prices=shadow_prices,
        contingencies=_contingencies(space, placement),
        unserved=left_out,
        workflows=problem.services.workflows,
        warnings=tuple(notes),
    )


def digests_of(cluster: Cluster, services: Services, profiles: ProfileLibrary, demand: Demand | None) -> dict[str, str]:
    """Return the digests by which a plan names what it was made from; without the demand where that is not known."""
    return {
        "cluster": canonical_digest([cluster]),
        "services": canonical_digest([services]),
        "profiles": profiles.digest,
    } | ({} if demand is None else {"demand": canonical_digest([demand])})


def solver_report(
    space: PlanningSpace, tiers: tuple[TierOutcome, ...], wall_s: float, *, method: str = "direct"
) -> SolverReport:
    """Return the certificate: the first tier's, with every tier beside it. Its name tells solver and method."""
    first = tiers[0]
    backend = space.problem.settings.backend
    return SolverReport(
        name=backend if method == "direct" else f"{backend}+{method}",
        status="optimal" if first.gap <= 1e-6 else "feasible",
        objective=first.value,
        bound=first.bound,
        gap=first.gap,
        wall_s=wall_s,
        seed=space.problem.settings.seed,
        tiers=tuple(
            Tier(name=tier.objective.name, objective=tier.value, bound=tier.bound, gap=tier.gap)
            for tier in tiers
            if math.isfinite(tier.bound)
        ),
    )


def _prior(running: Plan | None) -> Prior | None:
    """Return a reference to the running plan. Its generation is the store's business: one after its own prior."""
    if running is None:
        return None
    generation = 1 if running.prior is None else running.prior.generation + 1
    return Prior(generation=generation, digest=running.placement_digest)


class Drafts:
    """Makes plans that hold what a simulation needs to know of a placement, and nothing else.

    Replicas that share a group share its compute evenly; a service's rate goes by what its replicas then sustain.
    """

    def __init__(self, space: PlanningSpace, report: SolverReport) -> None:
        self._space = space
        self._report = report
        self._idle: dict[int, LoadoutEntry] = {}

    def __call__(self, pairs: Iterable[tuple[int, int]]) -> Plan:
        """Return the plan of ``pairs`` (group, option)."""
        chosen = sorted(pairs)
        on_group = Counter(group for group, _ in chosen)
        placement = tuple(Placed(group, option, 1.0 / on_group[group]) for group, option in chosen)
        groups, routes = _groups(self._space, placement, self._idle), _routes(self._space, placement)
        return Plan(solver=self._report, groups=groups, routes=routes)


def _groups(
    space: PlanningSpace, placement: Placement, idle: dict[int, LoadoutEntry] | None = None
) -> tuple[Group, ...]:
    """Return the groups of ``placement``; ``idle`` keeps entries without a rate, by option, from call to call."""
    loadouts: dict[int, list[LoadoutEntry]] = {}
    position_of = {name: index for index, name in enumerate(space.names)}
    idle = {} if idle is None else idle
    for placed in placement:
        if placed.option not in idle:
            idle[placed.option] = _idle_entry(space, placed.option)
        # Checked once per option: the rate is the one thing that differs, and checking every entry takes longest.
        entry = idle[placed.option].model_copy(update={"rate_rps": _rate_rps(space, placed)})
        loadouts.setdefault(placed.group, []).append(entry)
    return tuple(
        Group(
            id=space.groups[position].id,
            node=space.groups[position].node,
            gpus=space.groups[position].gpus,
            tp=space.groups[position].tp,
            pp=space.groups[position].pp,
            loadout=tuple(sorted(entries, key=lambda entry: position_of[entry.service])),
        )
        for position, entries in loadouts.items()
    )


def _idle_entry(space: PlanningSpace, position: int) -> LoadoutEntry:
    """Return the entry of an option (by position) that is given no rate."""
    option = space.options[position]
    service = space.problem.services.service(option.service)
    profile = space.problem.profiles.profile(option.variant, option.gpu_type)
    return LoadoutEntry(
        service=option.service,
        variant=option.variant,
        max_batch=option.batch,
        multi_frame=option.multi_frame,
        rate_rps=0.0,
        memory_bytes=tuple(size for size in option.memory_bytes for _ in range(option.tp)),
        weight_bytes=option.weight_bytes,
        load_s=option.load_s,
        deadline_s=option.deadline_s,
        stage_latency_s=latency_model(space, option).stage_latency_table(option.batch),
        tokens=token_rules(service, profile, option.tp, option.pp),
    )


def _rate_rps(space: PlanningSpace, placed: Placed) -> float:
    return placed.share * float(space.sustained_rps[placed.option])


def _routes(space: PlanningSpace, placement: Placement) -> dict[str, tuple[Route, ...]]:
    """Return the routing weights: shares of the rate, or equal where nothing is served yet; they sum to exactly 1."""
    rates: dict[str, list[tuple[str, float]]] = {}
    for placed in placement:
        service = space.options[placed.option].service
        rates.setdefault(service, []).append((space.groups[placed.group].id, _rate_rps(space, placed)))
    return {name: _weights(rates[name]) for name in space.names if name in rates}


def _contingencies(space: PlanningSpace, placement: Placement) -> tuple[Contingency, ...]:
    """Return what the replicas serve in every demand scenario, and after every loss that the plan is to survive."""
    settings = space.problem.settings
    linear, budget = solver(settings.backend), Budget(time_limit_s=10.0, seed=settings.seed)
    found = []
    for block in space.requirements.blocks:
        routed = routed_in(space, placement, block, linear, budget)
        found.append(
            Contingency(
                kind="scenario" if block.lost_node is None else "loss",
                name=block.name,
                offered_rps=float(space.weight @ block.offered_rps),
                goodput_rps=float(space.weight @ space.served_rps(routed)),
                routes=_routes(space, routed),
            )
        )
    return tuple(found)


def _weights(rates: list[tuple[str, float]]) -> tuple[Route, ...]:
    total = math.fsum(rate for _, rate in rates)
    if total <= 0:
        rates, total = [(group, 1.0) for group, _ in rates], float(len(rates))
    weights = [(group, rate / total) for group, rate in rates if rate / total > 1e-9]
    # The largest takes what rounding leaves.
    largest = max(range(len(weights)), key=lambda index: weights[index][1])
    rest = math.fsum(weight for index, (_, weight) in enumerate(weights) if index != largest)
    weights[largest] = (weights[largest][0], 1.0 - rest)
    return tuple(Route(group=group, weight=weight) for group, weight in weights)


def _warnings(space: PlanningSpace, placement: Placement) -> list[str]:
    found: dict[str, None] = {}
    for placed in placement:
        option = space.options[placed.option]
        where = f"{option.service}: {option.variant} on {option.gpu_type} at batch {option.batch}"
        if option.confidence in ("extrapolated", "modelled"):
            found[f"{where} rests on {option.confidence} latencies; measure it with `foreplan profile run`"] = None
        if option.at_floor and placed.share > 0:
            found[
                f"{where} is planned for {option.utilisation:.0%} utilisation, more than the tail bound allows for an "
                f"attainment of {space.problem.services.service(option.service).slo.attainment:g}"
            ] = None
    return list(found)
