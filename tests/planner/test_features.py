"""Every feature of the model against enumeration, and against another solver."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foreplan.planning import verify
from planner import Infeasible, Problem, Solved, solve
from planner.deadline_split import as_planned
from planner.space import build_space
from plans.demand import Demand, Scenario
from plans.plan import Plan
from plans.service import Edge, LatencySlo, Services, Spread, Workflow
from tests.planner.brute_force import best_goodput
from tests.planner.problems import (
    FEATURES,
    KINDS,
    cluster,
    demand,
    featured,
    generated,
    generated_of,
    latency_service,
    problem,
    profile,
)

ENUMERATED = tuple(name for name in FEATURES if name not in ("cost", "scenarios"))


@pytest.mark.parametrize("feature", ENUMERATED)
@pytest.mark.parametrize("seed", range(2))
def test_brute_force_agrees_with_every_feature(feature: str, seed: int) -> None:
    shape = ({"services": 3, "nodes": 2}, {"services": 2, "nodes": 3})[seed]
    wanted = featured(generated(40 + seed, load=2.5, batches=(4,), **shape), feature)  # type: ignore[arg-type]
    result = solve(wanted)
    # Enumerated with the split of end-to-end deadlines that was chosen; test_deadline_split.py compares splits.
    best = best_goodput(as_planned(wanted, result.plan) if isinstance(result, Solved) else wanted)
    if best is None:
        assert isinstance(result, Infeasible)
        return
    assert isinstance(result, Solved)
    assert result.plan.solver.objective == pytest.approx(best, rel=1e-5, abs=1e-5)
    assert result.plan.solver.bound == pytest.approx(best, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("feature", FEATURES)
def test_highs_and_cbc_agree_on_every_feature(feature: str) -> None:
    wanted = featured(generated(70, services=3, nodes=3, gpus=1, load=4.0, batches=(2, 8)), feature)
    results = [solve(replace(wanted, settings=replace(wanted.settings, backend=name))) for name in ("highs", "cbc")]  # type: ignore[arg-type]
    assert type(results[0]) is type(results[1])
    plans = [result.plan for result in results if isinstance(result, Solved)]
    for plan in plans:
        assert plan.solver.gap <= 1e-5
    if plans:
        assert plans[0].solver.objective == pytest.approx(plans[1].solver.objective, rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_direct_columns_and_cbc_agree(seed: int) -> None:
    """Every kind of problem meets every feature: the two numbers have no common divisor, and 104 is below 200."""
    assert_agreement(KINDS[seed % len(KINDS)], FEATURES[seed % len(FEATURES)], seed)


@pytest.mark.parametrize("seed", [203, 204, 205])
def test_direct_columns_and_cbc_agree_on_frames_tokens_and_limits(seed: int) -> None:
    """The kinds that no other test of every run has; all of them, with every feature, are the slow ones."""
    assert_agreement(KINDS[seed % len(KINDS)], FEATURES[seed % len(FEATURES)], seed)


def test_the_generated_problems_cover_every_pair_of_kind_and_feature() -> None:
    pairs = {(KINDS[seed % len(KINDS)], FEATURES[seed % len(FEATURES)]) for seed in range(200)}
    assert len(pairs) == len(KINDS) * len(FEATURES)


def assert_agreement(kind: str, feature: str, seed: int) -> None:
    wanted = featured(generated_of(kind, seed), feature)
    wanted = replace(wanted, settings=replace(wanted.settings, time_limit_s=240.0))
    ways = ({}, {"method": "columns"}, {"backend": "cbc"})
    results = [solve(replace(wanted, settings=replace(wanted.settings, **way))) for way in ways]  # type: ignore[arg-type]
    assert len({type(result) for result in results}) == 1
    solved = [result.plan for result in results if isinstance(result, Solved)]
    for plan in solved:
        assert plan.solver.gap <= 1e-5
        assert plan.solver.objective == pytest.approx(solved[0].solver.objective, rel=1e-5, abs=1e-5)
        assert_every_promise(plan, wanted)


def assert_every_promise(plan: Plan, wanted: Problem) -> None:
    stated = {name: value for name in ("attainment", "keep_after_loss") if (value := getattr(wanted.settings, name))}
    checked = plan.model_copy(update={"settings": stated})
    assert verify(checked, wanted.cluster, wanted.services, wanted.profiles, wanted.demand) == ()


@pytest.mark.parametrize("feature", FEATURES)
def test_the_checker_passes_plans_with_every_feature(feature: str) -> None:
    wanted = featured(generated(72, services=3, nodes=3, load=1.2, batches=(4,)), feature)
    result = solve(wanted)
    assert isinstance(result, Solved)
    assert_every_promise(result.plan, wanted)


def two_nodes(*services: object, workflows: tuple[Workflow, ...] = (), count: int = 2, **rates: float) -> Problem:
    wanted = problem(
        cluster(("a", "gpu", count), ("b", "gpu", count)),
        list(services),  # type: ignore[arg-type]
        [profile("m"), profile("n", base_s=0.02)],
        demand(**rates),
    )
    stated = Services(services=wanted.services.services, workflows=workflows)
    return replace(wanted, services=stated)


def planned(wanted: Problem) -> Plan:
    result = solve(wanted)
    assert isinstance(result, Solved), result
    return result.plan


def test_every_replica_that_min_replicas_asks_for_serves() -> None:
    plan = planned(two_nodes(latency_service("s", ("m", 1.0), min_replicas=3), s=5.0))
    rates = [entry.rate_rps for group in plan.groups for entry in group.loadout]
    assert len(rates) == 3
    assert min(rates) > 0.05 * 5.0 / 3


def test_replicas_are_spread_and_domains_are_held() -> None:
    service = latency_service("s", ("m", 1.0), min_replicas=2, spread=Spread(over="node"))
    assert {group.node for group in planned(two_nodes(service, s=5.0)).groups} == {"a", "b"}
    both = latency_service("s", ("m", 1.0), spread=Spread(over="node", max_skew=9, min_domains=2))
    assert {group.node for group in planned(two_nodes(both, s=5.0)).groups} == {"a", "b"}


def test_a_spread_is_also_written_short() -> None:
    assert Spread.model_validate("zone") == Spread(over="zone", max_skew=1, min_domains=0)


def test_a_service_that_only_a_workflow_calls_gets_its_callers_rate_times_fan_out() -> None:
    edges = (
        Edge(source="s", target="t", fanout=2.0),
        Edge(source="t", target="u", fanout=0.5),
        Edge(source="s", target="u", fanout=1.0),
    )
    flow = Workflow(name="w", slo=LatencySlo(deadline_s=2.0), edges=edges)
    names = ("s", "t", "u")
    plan = planned(two_nodes(*(latency_service(name, ("m", 1.0)) for name in names), workflows=(flow,), s=10.0))
    assert [each.offered_rps for each in plan.predicted] == pytest.approx([10.0, 20.0, 20.0])
    served = {
        name: sum(entry.rate_rps for group in plan.groups for entry in group.loadout if entry.service == name)
        for name in names
    }
    assert served == pytest.approx({"s": 10.0, "t": 20.0, "u": 20.0})


def test_the_parts_of_an_end_to_end_deadline_sum_to_at_most_the_whole() -> None:
    edges = (Edge(source="s", target="t", payload_bytes=10**6), Edge(source="t", target="u"))
    flow = Workflow(name="w", slo=LatencySlo(deadline_s=0.3), edges=edges)
    services = [latency_service(name, (model, 1.0), deadline_s=1.0) for name, model in zip("stu", "mnm", strict=True)]
    plan = planned(two_nodes(*services, workflows=(flow,), s=5.0))
    parts = {entry.service: entry.deadline_s for group in plan.groups for entry in group.loadout}
    transfers_s = 2 * 50e-6 + 10**6 / 1.25e9
    assert sum(parts.values()) == pytest.approx(0.3 - transfers_s)
    assert parts["t"] == pytest.approx(2 * parts["s"])  # its model takes twice as long


def test_neighbours_in_a_workflow_share_a_node_where_that_costs_nothing() -> None:
    flow = Workflow(
        name="w", slo=LatencySlo(deadline_s=0.4), edges=(Edge(source="s", target="t", payload_bytes=10**7),)
    )
    services = [latency_service(name, ("m", 1.0), deadline_s=0.03) for name in "st"]
    # Each fills a GPU of its own: 18 ms of a tight deadline cannot be shared.
    plan = planned(two_nodes(*services, workflows=(flow,), s=20.0))
    crossing = next(tier for tier in plan.solver.tiers if tier.name == "bytes-crossing")
    assert crossing.objective == pytest.approx(0.0, abs=1e-9)
    assert len({group.node for group in plan.groups}) == 1


def test_the_loss_of_a_node_leaves_the_share_that_was_asked_for() -> None:
    wanted = two_nodes(latency_service("s", ("m", 1.0)), s=120.0)
    alone = planned(wanted)
    safe = planned(replace(wanted, settings=replace(wanted.settings, keep_after_loss=0.9)))
    assert alone.contingencies == ()
    losses = {each.name: each.goodput_rps for each in safe.contingencies}
    assert set(losses) == {"a", "b"}
    assert min(losses.values()) >= 0.9 * safe.solver.objective * (1 - 1e-5)
    assert {group.node for group in safe.groups} == {"a", "b"}


def test_at_scale_one_routing_answers_every_loss() -> None:
    base = generated(9, services=6, nodes=12, load=2.0, batches=(1, 2, 4, 8))
    wanted = replace(base, settings=replace(base.settings, keep_after_loss=0.6, time_limit_s=6.0, gap=5e-3))
    assert build_space(wanted).requirements.one_emergency
    plan = planned(wanted)
    assert_every_promise(plan, wanted)
    rates = {
        service.name: sum(e.rate_rps for group in plan.groups for e in group.loadout if e.service == service.name)
        for service in wanted.services.services
    }
    for loss in plan.contingencies:
        # The emergency routing keeps the share of every service, so the best routing keeps that of their sum.
        weighted = sum(service.weight * rates[service.name] for service in wanted.services.services)
        assert loss.goodput_rps >= 0.6 * weighted * (1 - 1e-5)


def test_scenarios_that_the_demand_states_are_planned_for_with_routes_of_their_own() -> None:
    wanted = two_nodes(latency_service("s", ("m", 1.0)), latency_service("t", ("m", 1.0)), count=1, s=10.0, t=10.0)
    stated = Demand(
        window_s=60.0,
        services=wanted.demand.services,
        scenarios=(
            Scenario(name="calm", rate_rps={"s": 5.0}),
            Scenario(name="rush", rate_rps={"s": 250.0, "t": 5.0}),
        ),
    )
    plan = planned(replace(wanted, demand=stated, settings=replace(wanted.settings, scenarios=2)))
    calm, rush = plan.contingencies
    assert (calm.name, calm.offered_rps, calm.goodput_rps) == ("calm", 15.0, pytest.approx(15.0))
    assert (rush.name, rush.offered_rps) == ("rush", 255.0)
    mean = next(tier for tier in plan.solver.tiers if tier.name == "scenario-goodput")
    assert mean.objective == pytest.approx((calm.goodput_rps + rush.goodput_rps) / 2)
    assert len(rush.routes["s"]) == 2


def test_the_seed_decides_sampled_scenarios() -> None:
    base = featured(generated(70, services=2, nodes=2, load=2.0), "scenarios")
    plans = [planned(replace(base, settings=replace(base.settings, seed=seed))) for seed in (1, 1, 2)]
    offered = [[each.offered_rps for each in plan.contingencies] for plan in plans]
    assert offered[0] == offered[1] != offered[2]
