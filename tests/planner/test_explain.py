from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from planner import Solved, explain, solve
from planner.backend import Budget, Solution, solver
from planner.explain import placement_of
from planner.formulation import Formulation
from planner.objective import GOODPUT, with_kept
from planner.problem import Problem
from planner.space import build_space
from planner.whynot import Price, Valued, price_of
from plans.errors import InvalidInput
from plans.plan import Plan
from plans.service import FrequencyService, GenerationService
from plans.units import format_bytes
from tests.planner.problems import QUIET, cluster, crowd, demand, latency_service, problem, profile, town


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
    expected = "goodput and accuracy (times rate) would be the same, but GPU cost would be 1 per hour more"
    assert priced.why_not == expected


def two_ways() -> Problem:
    """Return a service whose accurate variant meets its deadline with two GPUs alone, and whose other one with one."""
    return problem(
        cluster(("a", "gpu", 2)),
        [latency_service("s", ("good", 0.9), ("poor", 0.5))],
        [
            profile("good", base_s=0.25, batches=(1,), parallelisms=((1, 1), (2, 1))),
            profile("poor", base_s=0.02, batches=(1,), parallelisms=((1, 1), (2, 1))),
        ],
        demand(s=1.0),
    )


def test_a_parallelism_that_would_cost_accuracy_is_priced_in_accuracy_and_not_called_the_same() -> None:
    wanted = two_ways()
    result = solve(wanted)
    assert isinstance(result, Solved)
    assert [(group.tp, group.loadout[0].variant) for group in result.plan.groups] == [(2, "good")]
    (priced,) = explain(wanted, result.plan, "s", time_limit_s=20.0).solved_again
    assert priced.what == "tp 1, pp 1"
    # 0.9 and 0.5 times 1 rps.
    assert priced.why_not == "goodput would be the same, but accuracy (times rate) would be 0.5 instead of 0.9"


def test_a_plan_that_could_be_cheaper_is_said_to_be_so() -> None:
    text = str(
        Price(
            values=(
                Valued(name="goodput", planned=2.0, forced=2.0, bound=2.0, same=True, better=False),
                Valued(name="gpu-cost", planned=8.0, forced=4.0, bound=4.0, same=False, better=True),
            )
        )
    )
    expected = "goodput would be the same, but GPU cost would be 4 per hour less, which the plan has not found"
    assert text == expected


def test_a_node_where_the_service_runs_is_said_to_have_it() -> None:
    wanted = two_ways()
    result = solve(wanted)
    assert isinstance(result, Solved)
    found = explain(wanted, result.plan, "s", node="a", time_limit_s=20.0).solved_again
    assert (found[0].what, found[0].why_not) == ("a", "it runs there already")


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
    for other in found.parallelisms:
        where = re.fullmatch(r"tp ([0-9]+), pp ([0-9]+) on (.+)", other.what)
        assert where is not None, other
        follows(wanted, result.plan, service, other.why_not, (where[3], int(where[1]), int(where[2])))
    for other in found.variants:
        text = re.fullmatch(r"accuracy ([0-9.]+), (.+)", other.why_not)
        if text is not None:
            (variant,) = (each for each in wanted.services.service(service).variants if each.model == other.what)
            assert float(text[1]) == pytest.approx(variant.accuracy, rel=1e-3)
        follows(wanted, result.plan, service, other.why_not if text is None else text[2], None)
    for other in found.places:
        is_so(wanted, result.plan, service, other.what, other.why_not)
    assert found.shadow_prices == result.plan.shadow_prices
    assert found.predicted_rps == next(each.goodput_rps for each in result.plan.predicted if each.service == service)


NUMBER = r"([0-9.e+-]+)"


def follows(wanted: Problem, plan: Plan, service: str, text: str, kind: tuple[str, int, int] | None) -> None:
    """Check every number of a comparison, or of a rejection, of ``service`` against the documents and the plan."""
    limit = wanted.services.service(service).max_gpus
    rejected = re.fullmatch(r"(?:no option works: )?(memory|latency|accuracy): (.+)", text)
    if rejected is not None:
        numbers = {
            "memory": r"(.+) at batch ([0-9]+) needs .+, .+ usable per GPU",
            "latency": r"(.+) at batch ([0-9]+) takes .+ against a deadline of .+",
            "accuracy": rf"{NUMBER} of (.+) is below min_accuracy {NUMBER}",
        }
        found = re.fullmatch(numbers[rejected[1]], rejected[2])
        assert found is not None, text
        if kind is not None and rejected[1] == "memory":
            document = wanted.profiles.profile(found[1], kind[0])
            assert document is not None
            (row,) = (each for each in document.rows if (each.tp, each.pp, each.batch) == (*kind[1:], int(found[2])))
            usable = wanted.cluster.gpu_types[kind[0]].memory_bytes * (1 - wanted.settings.headroom_ratio)
            assert max(row.peak_bytes) > usable
            assert f"{format_bytes(usable)} usable per GPU" in text
        return
    rated = rf"{NUMBER} rps per GPU \((.+), batch ([0-9]+)\) against {NUMBER} as placed \((.+) on (.+)\); (.+)"
    match = re.fullmatch(rated, text)
    assert match is not None, text
    accuracy = {each.model: each.accuracy for each in wanted.services.service(service).variants}
    kinds = [kind] if kind is not None else [(t, *p) for t in ("slow", "quick") for p in ((1, 1), (2, 1), (1, 2))]
    rates = {
        (each, bears(wanted, service, match[2], *each, int(match[3]))[1] / (each[1] * each[2]))
        for each in kinds
        if wanted.profiles.latency(match[2], *each) is not None
    }
    close = [each for each, rate in rates if rate == pytest.approx(float(match[1]), rel=1e-3)]
    assert close, text
    node_types = {node.name: node.gpus.type for node in wanted.cluster.nodes}
    placed = [
        bears(wanted, service, match[5], match[6], group.tp, group.pp, entry.max_batch)[1] / (group.tp * group.pp)
        for group in plan.groups
        if node_types[group.node] == match[6]
        for entry in group.loadout
        if (entry.service, entry.variant) == (service, match[5])
    ]
    assert float(match[4]) == pytest.approx(max(placed), rel=1e-3)
    costs = [
        wanted.cluster.gpu_types[gpu_type].cost_per_hour / rate
        for gpu_type, rate in ((close[0][0], float(match[1])), (match[6], float(match[4])))
    ]
    decisions = {
        rf"max_gpus {NUMBER} is below its {NUMBER} GPUs": (limit, close[0][1] * close[0][2]),
        rf"its accuracy {NUMBER} is below {NUMBER}, and accuracy comes before GPU cost": (
            accuracy[match[2]],
            accuracy[match[5]],
        ),
        rf"GPU cost decides: {NUMBER} per hour for each rps against {NUMBER}": tuple(costs),
        r"goodput decides: GPUs used so serve less": (),
        r"served in full as placed": (),
        rf"goodput decides: its {NUMBER} GPUs of one node serve more otherwise": (close[0][1] * close[0][2],),
        r"goodput decides: its GPU serves more otherwise": (),
    }
    (decided,) = (
        (hit, values) for pattern, values in decisions.items() if (hit := re.fullmatch(pattern, match[7])) is not None
    )
    assert [float(each) for each in decided[0].groups()] == pytest.approx(list(decided[1]), rel=2e-3)


def is_so(wanted: Problem, plan: Plan, service: str, node: str, text: str) -> None:
    """Check what is said of a node without ``service`` against the documents and the plan."""
    (place,) = (each for each in wanted.cluster.nodes if each.name == node)
    there = [group for group in plan.groups if group.node == node]
    free = re.fullmatch(r"not needed: ([0-9]+)% of its compute would be free", text)
    if text == "pin or forbid rules it out":
        document = wanted.services.service(service)
        assert not any(document.allows(node, (gpu,)) for gpu in range(place.gpus.count))
    elif free is not None:
        used = {gpu for group in there for gpu in group.gpus}
        shares = [
            1 - sum(each.rate_rps / bears_of(wanted, plan, group.id, each.service) for each in group.loadout)
            for group in there
        ]
        most = 1.0 if len(used) < place.gpus.count else max(shares)
        assert int(free[1]) == pytest.approx(100 * most, abs=0.51)
    else:
        assert text in (
            "its GPUs are planned to their limit of utilisation",
            "its GPUs work in groups of another parallelism",
            f"no option works on {place.gpus.type}",
            f"max_gpus {wanted.services.service(service).max_gpus} is reached",
            "what runs there would block it, or be blocked by it, beyond a deadline",
        ), text


def bears_of(wanted: Problem, plan: Plan, group_id: str, service: str) -> float:
    """Return the most that a replica serves: of batches that were not measured, and of passes, as the planner says."""
    kinds = {node.name: node.gpus.type for node in wanted.cluster.nodes}
    (group,) = (each for each in plan.groups if each.id == group_id)
    (entry,) = (each for each in group.loadout if each.service == service)
    key = (service, entry.variant, kinds[group.node], group.tp, group.pp, entry.max_batch)
    (option,) = (each for each in build_space(replace(wanted, current=plan)).options if each.key == key)
    return option.sustained_rps


def test_what_is_solved_again_and_the_price_of_a_budget_are_what_another_solver_says() -> None:
    wanted = two_ways()
    wanted = replace(
        wanted,
        services=wanted.services.model_copy(
            update={"services": tuple(each.model_copy(update={"max_gpus": 1}) for each in wanted.services.services)}
        ),
        demand=demand(s=120.0),
    )
    result = solve(wanted)
    assert isinstance(result, Solved)
    found = explain(wanted, result.plan, "s", time_limit_s=20.0)
    loose = tuple(each.model_copy(update={"max_gpus": 2}) for each in wanted.services.services)
    more = replace(wanted, services=wanted.services.model_copy(update={"services": loose}))
    assert found.budget_price == pytest.approx(relaxed(more) - relaxed(wanted), rel=1e-5)
    (again,) = found.solved_again
    assert (again.what, again.why_not) == ("tp 2, pp 1", "no plan that keeps every limit does")
    roomy = solve(more)
    assert isinstance(roomy, Solved)
    (priced,) = explain(more, roomy.plan, "s", time_limit_s=20.0).solved_again
    (forced,) = re.findall(rf"goodput would be {NUMBER} instead of {NUMBER}", priced.why_not)
    space = build_space(more)
    # Both GPUs work in one group of two; any other parallelism has them one by one.
    assert priced.what == "tp 1, pp 1"
    formulation = Formulation(space, [each for each in space.classes if each.tp == 1])
    answer = solver("scip").solve(with_kept(formulation, GOODPUT, ()), Budget(time_limit_s=20))
    assert isinstance(answer, Solution)
    assert float(forced[0]) == pytest.approx(answer.objective, rel=1e-4)
    assert float(forced[1]) == pytest.approx(roomy.plan.solver.objective, rel=1e-4)


def relaxed(wanted: Problem) -> float:
    space = build_space(wanted)
    answer = solver("scip").solve(
        with_kept(Formulation(space, space.classes), GOODPUT, ()).relaxed(), Budget(time_limit_s=20)
    )
    assert isinstance(answer, Solution)
    return answer.objective


def test_a_node_whose_gpus_work_in_a_larger_group_is_not_called_free() -> None:
    wanted = problem(
        cluster(("a", "gpu", 2), ("b", "gpu", 1)),
        [latency_service("wide", ("w", 0.9), pin=("a",)), latency_service("s", ("m", 0.9))],
        [profile("w", base_s=0.25, batches=(1,), parallelisms=((2, 1),)), profile("m")],
        demand(wide=1.0, s=1.0),
    )
    result = solve(wanted)
    assert isinstance(result, Solved)
    assert {group.id for group in result.plan.groups} == {"a/0-1", "b/0"}
    (place,) = explain(wanted, result.plan, "s").places
    assert (place.what, place.why_not) == ("a", "its GPUs work in groups of another parallelism")


def test_a_parallelism_without_options_names_the_memory_of_the_accurate_variant_and_not_the_accuracy_of_another() -> (
    None
):
    wanted = problem(
        cluster(("a", "gpu", 2)),
        [latency_service("s", ("fat", 0.9), ("m", 0.5), min_accuracy=0.8)],
        [profile("fat", weights_gib=20.0, parallelisms=((1, 1), (2, 1))), profile("m")],
        demand(s=1.0),
    )
    result = solve(wanted)
    assert isinstance(result, Solved)
    (other,) = explain(wanted, result.plan, "s").parallelisms
    assert other.what == "tp 1, pp 1 on gpu"
    assert other.why_not.startswith("no option works: memory: fat at batch 1 needs")


def test_a_parallelism_is_compared_with_the_same_variant_and_the_deciding_limit_is_named() -> None:
    wanted = problem(
        cluster(("a", "gpu", 2)),
        [latency_service("s", ("m", 0.9), ("tiny", 0.5), max_gpus=1)],
        [
            profile("m", parallelisms=((1, 1), (2, 1))),
            profile("tiny", base_s=0.001, parallelisms=((1, 1), (2, 1))),
        ],
        demand(s=5.0),
    )
    result = solve(wanted)
    assert isinstance(result, Solved)
    found = explain(wanted, result.plan, "s")
    assert {replica.variant for replica in found.replicas} == {"m"}
    (other,) = found.parallelisms
    assert "(m, batch" in other.why_not
    assert other.why_not.endswith("as placed (m on gpu); max_gpus 1 is below its 2 GPUs")
    (variant,) = found.variants
    assert variant.why_not.endswith("its accuracy 0.5 is below 0.9, and accuracy comes before GPU cost")


def test_the_objective_that_the_plan_was_made_for_is_the_one_that_decides() -> None:
    wanted = problem(
        cluster(("a", "gpu", 2)),
        [latency_service("s", ("m", 1.0)), latency_service("t", ("m", 1.0))],
        [profile("m", parallelisms=((1, 1), (2, 1)))],
        demand(s=300.0, t=300.0),
        settings=replace(QUIET, objective="max-min"),
    )
    result = solve(wanted)
    assert isinstance(result, Solved)
    (other,) = explain(wanted, result.plan, "s").parallelisms
    assert "max-min fairness decides" in other.why_not


def test_an_explanation_says_what_is_planned_and_what_is_predicted_and_that_prices_are_of_the_relaxation() -> None:
    wanted = crowd(latency_service("s", ("m", 1.0), max_gpus=1), s=250.0)
    result = solve(wanted)
    assert isinstance(result, Solved)
    (predicted,) = result.plan.predicted
    served = predicted.model_copy(update={"goodput_rps": 250.0, "attainment": 1.0})
    plan = result.plan.model_copy(update={"predicted": (served,)})
    text = " ".join(" ".join(explain(wanted, plan, "s").lines()).split())
    assert "of 250 rps are served within the planned utilisation; 250 rps are predicted to be in time" in text
    assert text.count("relaxation's goodput") == 2
    assert any("beyond the planned utilisation" in warning for warning in plan.warnings)
