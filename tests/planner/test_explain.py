from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from planner import Solved, explain, solve
from planner.explain import placement_of
from planner.problem import Problem
from planner.space import build_space
from planner.whynot import Price, price_of
from plans.errors import InvalidInput
from plans.plan import Plan, Unserved
from plans.service import FrequencyService, GenerationService, Service
from tests.planner.problems import QUIET, cluster, demand, latency_service, problem, profile, town


def outcome(wanted: Problem) -> tuple[Unserved, ...]:
    result = solve(wanted)
    assert isinstance(result, Solved)
    return result.plan.unserved


def crowd(*services: Service, **rates: float) -> Problem:
    return problem(
        cluster(("a", "gpu", 1), ("b", "gpu", 1)),
        list(services),
        [profile("m"), profile("heavy", weights_gib=15.0), profile("huge", weights_gib=40.0), profile("tiny")],
        demand(**rates),
    )


def test_too_large_a_model_is_unserved_for_memory() -> None:
    (left,) = outcome(crowd(latency_service("s", ("huge", 1.0)), s=5.0))
    assert (left.service, left.rate_rps, left.reason) == ("s", 5.0, "memory")
    assert "40" in left.detail
    assert "usable" in left.detail


def test_too_tight_a_deadline_is_unserved_for_latency() -> None:
    (left,) = outcome(crowd(latency_service("s", ("m", 1.0), deadline_s=0.005), s=5.0))
    assert left.reason == "latency"
    assert "5 ms" in left.detail


def test_full_groups_are_unserved_for_compute() -> None:
    (left,) = outcome(crowd(latency_service("s", ("m", 1.0)), s=5000.0))
    assert left.reason == "compute"
    assert left.rate_rps < 5000.0


def test_a_spent_budget_is_unserved_for_budget() -> None:
    (left,) = outcome(crowd(latency_service("s", ("m", 1.0), max_gpus=1), s=250.0))
    assert left.reason == "budget"
    assert "max_gpus" in left.detail


def test_a_forbid_of_everything_is_unserved_for_budget() -> None:
    (left,) = outcome(crowd(latency_service("s", ("m", 1.0), forbid=("a", "b")), s=1.0))
    assert left.reason == "budget"
    assert "pin and forbid" in left.detail


def test_no_variant_that_is_accurate_and_profiled_is_unserved_for_accuracy() -> None:
    (left,) = outcome(crowd(latency_service("s", ("ghost", 0.9), ("m", 0.5), min_accuracy=0.8), s=1.0))
    assert left.reason == "accuracy"
    assert "min_accuracy is 0.8" in left.detail


def test_memory_taken_by_others_is_unserved_for_memory() -> None:
    left = outcome(
        crowd(
            latency_service("first", ("heavy", 1.0), weight=5.0),
            latency_service("second", ("heavy", 1.0), weight=5.0),
            latency_service("late", ("m", 1.0)),
            first=10.0,
            second=10.0,
            late=10.0,
        )
    )
    assert [(each.service, each.reason) for each in left] == [("late", "memory")]
    assert "of their memory free" in left[0].detail


def test_blocking_neighbours_are_unserved_for_latency() -> None:
    left = outcome(
        problem(
            cluster(("a", "gpu", 1)),
            [
                latency_service("long", ("n", 1.0), deadline_s=5.0, weight=9.0),
                latency_service("short", ("m", 1.0), deadline_s=0.02),
            ],
            [profile("m"), profile("n", base_s=0.2, batches=(1,))],
            demand(long=1.0, short=1.0),
        )
    )
    assert [(each.service, each.reason) for each in left] == [("short", "latency")]


@pytest.mark.parametrize("service", ["detect", "street", "chat", "read"])
def test_an_explanation_fits_a_screen_and_is_plain_data(service: str) -> None:
    wanted = town()
    result = solve(wanted)
    assert isinstance(result, Solved)
    found = explain(wanted, result.plan, service)
    lines = list(found.lines())
    assert 3 <= len(lines) <= 40
    assert max(len(line) for line in lines) <= 120
    assert json.loads(json.dumps(found.to_json()))["service"] == service
    assert found.served_rps == pytest.approx(found.offered_rps, rel=1e-5)
    assert found.binding == "served in full"
    assert found.confidence is not None
    stated = [entry.rate_rps for group in result.plan.groups for entry in group.loadout if entry.service == service]
    assert sum(replica.rate_rps for replica in found.replicas) == pytest.approx(sum(stated))


def test_an_explanation_names_the_pin_the_forbid_and_the_other_variant() -> None:
    wanted = town()
    result = solve(wanted)
    assert isinstance(result, Solved)
    street = explain(wanted, result.plan, "street")
    assert ("west", "pin or forbid rules it out") in {(each.what, each.why_not) for each in street.places}
    detect = explain(wanted, result.plan, "detect")
    variants = {replica.variant for replica in detect.replicas}
    assert {each.what for each in detect.variants} == {"eye-large", "eye-small"} - variants
    chat = explain(wanted, result.plan, "chat")
    assert any("tp 2" in each.what for each in chat.parallelisms)


def test_what_binds_is_what_the_plan_says() -> None:
    wanted = crowd(latency_service("s", ("m", 1.0), max_gpus=1), s=250.0)
    result = solve(wanted)
    assert isinstance(result, Solved)
    (left,) = result.plan.unserved
    assert explain(wanted, result.plan, "s").binding == f"{left.reason}: {left.detail}"


def test_a_service_that_runs_nowhere_is_explained_too() -> None:
    wanted = crowd(latency_service("s", ("huge", 1.0)), s=5.0)
    result = solve(wanted)
    assert isinstance(result, Solved)
    found = explain(wanted, result.plan, "s")
    assert found.replicas == ()
    assert found.confidence is None
    assert found.binding.startswith("memory")
    assert any("memory" in each.why_not for each in found.variants)


def test_a_node_is_priced_by_solving_again() -> None:
    wanted = crowd(
        latency_service("s", ("m", 1.0)), latency_service("heavy", ("heavy", 1.0), weight=5.0), s=1.0, heavy=90
    )
    result = solve(wanted)
    assert isinstance(result, Solved)
    homes = {group.node for group in result.plan.groups if group.entry("s")}
    free = next(node.name for node in wanted.cluster.nodes if node.name not in homes)
    found = explain(wanted, result.plan, "s", node=free, time_limit_s=20.0)
    (priced,) = found.solved_again
    assert priced.what == free
    pinned = [
        service.model_copy(update={"pin": (free,)}) if service.name == "s" else service
        for service in wanted.services.services
    ]
    forced = [service.model_copy(update={"min_replicas": 1}) if service.name == "s" else service for service in pinned]
    again = solve(replace(wanted, services=wanted.services.model_copy(update={"services": tuple(forced)})))
    assert isinstance(again, Solved)
    # Pinned there alone it may not do better than when it only has to run there too.
    price = price_of_node(wanted, result.plan, "s", free)
    assert price is not None
    assert price.forced is not None
    assert again.plan.solver.objective - 1e-6 <= price.forced <= result.plan.solver.objective + 1e-6


def price_of_node(wanted: Problem, plan: Plan, service: str, node: str) -> Price | None:
    space = build_space(replace(wanted, current=plan))
    return price_of(space, placement_of(space, plan), space.names.index(service), node=node, time_limit_s=20.0)


def test_what_no_plan_can_do_is_said_so() -> None:
    wanted = crowd(latency_service("s", ("m", 1.0), pin=("a",)), s=1.0)
    result = solve(wanted)
    assert isinstance(result, Solved)
    price = price_of_node(wanted, result.plan, "s", "b")
    assert price is not None
    assert price.forced is None
    assert "no plan that keeps every limit" in str(price)


def test_the_next_larger_parallelism_is_priced_too() -> None:
    wanted = problem(
        cluster(("a", "gpu", 2)),
        [latency_service("s", ("m", 1.0))],
        [profile("m", parallelisms=((1, 1), (2, 1)))],
        demand(s=5.0),
    )
    result = solve(wanted)
    assert isinstance(result, Solved)
    (priced,) = explain(wanted, result.plan, "s", time_limit_s=20.0).solved_again
    assert priced.what == "tp 2, pp 1"
    assert priced.why_not == "goodput would be the same, at 1 more per hour"


def test_one_more_gpu_of_a_budget_is_worth_what_solving_with_it_says() -> None:
    wanted = crowd(latency_service("s", ("m", 1.0), max_gpus=1, weight=2.0), s=1000.0)
    result = solve(wanted)
    assert isinstance(result, Solved)
    price = explain(wanted, result.plan, "s").budget_price
    more = wanted.services.services[0].model_copy(update={"max_gpus": 2})
    again = solve(replace(wanted, services=wanted.services.model_copy(update={"services": (more,)})))
    assert isinstance(again, Solved)
    assert price == pytest.approx(again.plan.solver.objective - result.plan.solver.objective, rel=1e-5)


def test_an_unknown_node_is_an_error() -> None:
    wanted = crowd(latency_service("s", ("m", 1.0)), s=1.0)
    result = solve(wanted)
    assert isinstance(result, Solved)
    with pytest.raises(InvalidInput, match="one of the nodes a, b"):
        explain(wanted, result.plan, "s", node="z")


def test_an_unknown_service_is_an_error_that_lists_the_known_ones() -> None:
    wanted = crowd(latency_service("s", ("m", 1.0)), s=1.0)
    result = solve(wanted)
    assert isinstance(result, Solved)
    with pytest.raises(InvalidInput, match="one of the services s"):
        explain(wanted, result.plan, "nope")


def test_a_plan_from_other_documents_is_an_error() -> None:
    wanted = crowd(latency_service("s", ("m", 1.0)), s=1.0)
    result = solve(wanted)
    assert isinstance(result, Solved)
    other = replace(wanted, services=crowd(latency_service("s", ("tiny", 1.0)), s=1.0).services)
    with pytest.raises(InvalidInput, match="a plan made from these documents"):
        explain(other, result.plan, "s")


def test_an_explanation_of_a_large_cluster_fits_a_screen() -> None:
    """Many long names: lines are wrapped, and each kind is cut before anything is left out at the end."""
    long = "a-name-as-long-as-generated-names-of-nodes-in-clouds-tend-to-be"
    types = [f"{long}-type-{index}" for index in range(8)]
    models = [f"{long}-model-{index}" for index in range(8)]
    wanted = problem(
        cluster(*((f"{long}-{index}", types[index % 8], 2) for index in range(24))),
        [latency_service(long, *((model, 0.9 - 0.01 * rank) for rank, model in enumerate(models)), max_gpus=12)],
        [profile(model, kind, parallelisms=((1, 1), (2, 1), (1, 2))) for model in models for kind in types],
        demand(**{long: 9000.0}),
        settings=replace(QUIET, time_limit_s=5.0, gap=0.1),
    )
    result = solve(wanted)
    assert isinstance(result, Solved)
    lines = list(explain(wanted, result.plan, long, node=f"{long}-23", time_limit_s=1.0).lines())
    assert len(lines) <= 40
    assert max(len(line) for line in lines) <= 120
    assert "this rests on profiles" in lines[-1]


def bears(
    wanted: Problem, service: str, model: str, gpu_type: str, tp: int, pp: int, batch: int
) -> tuple[float, float]:
    """Return hold and rate of a batch, from the documents alone: (3.2) with the settings' clips, f = 1 / 2."""
    document = wanted.services.service(service)
    demand = next(each for each in wanted.demand.services if each.service == service)
    found = wanted.profiles.profile(model, gpu_type)
    assert found is not None
    (row,) = (row for row in found.rows if (row.tp, row.pp, row.batch) == (tp, pp, batch))
    hold_s = max(row.stage_latency_s)
    assert row.latency_s.p99 is not None
    # A stage of n frames of one stream waits for the last of them: (3.6).
    frames = math.ceil(batch / demand.streams) if demand.streams else 1
    waits_s = (frames - 1) / document.slo.fps if isinstance(document, FrequencyService) else 0.0
    margin = 1.02 if isinstance(document, GenerationService) else 1.0
    patience_s = document.deadline_s(demand.output_tokens) - row.latency_s.p99 * margin - waits_s - hold_s / 2
    share = 1 - math.log(1 / (1 - document.slo.attainment)) * hold_s / batch * demand.burstiness_cv**2 / (
        2 * patience_s
    )
    return hold_s, min(0.9, max(0.25, share)) * batch / hold_s


@pytest.mark.parametrize("service", ["detect", "street", "read"])
def test_every_number_of_an_explanation_follows_from_the_documents(service: str) -> None:
    wanted = town()
    result = solve(wanted)
    assert isinstance(result, Solved)
    found = explain(wanted, result.plan, service)
    kinds = {node.name: node.gpus.type for node in wanted.cluster.nodes}
    groups = {group.id: group for group in result.plan.groups}
    per_gpu = 0.0
    for replica in found.replicas:
        group = groups[replica.group]
        (entry,) = (each for each in group.loadout if each.service == service)
        shape = (kinds[group.node], group.tp, group.pp)
        hold_s, most_rps = bears(wanted, service, replica.variant, *shape, replica.max_batch)
        assert (replica.rate_rps, replica.hold_s) == pytest.approx((entry.rate_rps, hold_s))
        assert replica.most_rps == pytest.approx(most_rps)
        assert replica.most_rps == pytest.approx(replica.utilisation_limit * replica.max_batch / hold_s)
        busy = sum(each.rate_rps * max(each.stage_latency_s[-1]) / each.max_batch for each in group.loadout)
        assert replica.utilisation == pytest.approx(busy)
        per_gpu = max(per_gpu, most_rps / len(group.gpus))
    rated = r"([0-9.e+]+) rps per GPU \((.+), batch ([0-9]+)\) against ([0-9.e+]+) as placed"
    for other in found.parallelisms:
        match = re.match(rated, other.why_not)
        where = re.match(r"tp ([0-9]+), pp ([0-9]+) on (.+)", other.what)
        if match is not None and where is not None:
            tp, pp = int(where[1]), int(where[2])
            _, most_rps = bears(wanted, service, match[2], where[3], tp, pp, int(match[3]))
            assert (float(match[1]), float(match[4])) == pytest.approx((most_rps / (tp * pp), per_gpu), rel=1e-3)
    assert found.shadow_prices == result.plan.shadow_prices
