from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from planner import Infeasible, NoPlanFound, Problem, Settings, Solved, solve
from planner import limits as limits_module
from planner import relaxation as relaxation_module
from planner.backend import Budget, InfeasibleModel, Solution, solver
from planner.conflict import Conflict, Conflicts, Infeasibility, explain_infeasible
from planner.formulation import Formulation
from planner.greedy import greedy
from planner.groups import GroupClass
from planner.limits import LimitModels, only
from planner.relaxation import Relaxation
from planner.space import PlanningSpace, build_space
from plans.service import Services, Spread
from tests.planner.problems import QUIET, cluster, demand, generated, latency_service, problem, profile


def conflicts(*services, nodes: int = 2, profiles=None, **rates: float) -> tuple:  # type: ignore[no-untyped-def]
    wanted = problem(
        cluster(*((f"n{index}", "gpu", 1) for index in range(nodes))),
        list(services),
        profiles or [profile("m"), profile("fat", weights_gib=10.0)],
        demand(**rates),
    )
    result = solve(wanted)
    assert isinstance(result, Infeasible), result
    assert result.conflicts.minimal
    return result.conflicts.members


def test_a_service_that_cannot_have_its_replicas_alone_is_named_with_the_limit() -> None:
    (found,) = conflicts(latency_service("s", ("m", 1.0), min_replicas=3), latency_service("t", ("m", 1.0)), s=1.0)
    assert (found.service, found.field) == ("s", "min_replicas")
    assert "needs 3 replicas" in found.detail
    assert "at most 2 fit" in found.detail
    assert str(found).startswith("s.min_replicas: ")


def test_a_budget_below_the_minimum_replicas_is_named_beside_them() -> None:
    found = conflicts(latency_service("s", ("m", 1.0), min_replicas=2, max_gpus=1), s=1.0)
    assert {each.field: each.detail for each in found} == {
        "min_replicas": "needs 2 replicas; at most 1 fit beside the others named",
        "max_gpus": "max_gpus 1",
    }


def test_a_pin_that_leaves_too_few_devices_is_named() -> None:
    found = conflicts(latency_service("s", ("m", 1.0), min_replicas=2, pin=("n0",)), s=1.0)
    assert {each.field for each in found} == {"min_replicas", "pin"}
    assert any(each.detail == "pin n0" for each in found)


def test_a_deadline_that_nothing_meets_is_the_reason() -> None:
    (found,) = conflicts(latency_service("s", ("m", 1.0), min_replicas=1, deadline_s=0.001), s=1.0)
    assert "at most 0 fit" in found.detail
    assert "deadline" in found.detail


def test_services_that_exclude_each_other_are_named_together_and_nobody_else() -> None:
    found = conflicts(
        latency_service("easy", ("m", 1.0), min_replicas=1),
        latency_service("one", ("fat", 1.0), min_replicas=1, pin=("n0",)),
        latency_service("two", ("fat", 1.0), min_replicas=1, pin=("n0",)),
        easy=1.0,
    )
    assert {each.service for each in found} == {"one", "two"}
    assert {each.field for each in found} == {"min_replicas", "pin"}


def test_out_of_time_before_any_plan_is_neither_a_plan_nor_infeasible() -> None:
    # Twelve models fill four GPUs to the last byte: greedy fails, and no time is left to find out whether any fit.
    rng = np.random.default_rng(0)
    weights_gib = rng.uniform(2.5, 7.0, 12)
    weights_gib *= 60.0 / weights_gib.sum()
    wanted = problem(
        cluster(*((f"n{index}", "gpu", 1) for index in range(4))),
        [latency_service(f"s{index}", (f"m{index}", 1.0), min_replicas=1) for index in range(12)],
        [profile(f"m{index}", weights_gib=float(size), batches=(1,)) for index, size in enumerate(weights_gib)],
        demand(),
        settings=Settings(time_limit_s=1e-6),
    )
    assert greedy(build_space(wanted)) is None
    result = solve(wanted)
    assert isinstance(result, NoPlanFound)
    assert "did not suffice" in result.detail


def over_constrained(name: str) -> Problem:
    """Return an infeasible problem for each kind of limit."""
    fields: dict[str, object] = {"min_replicas": 2}
    settings = QUIET
    nodes = [("n0", "gpu", 1), ("n1", "gpu", 1)]
    rate = 1.0
    if name == "budget":
        fields["max_gpus"] = 1
    elif name == "forbid":
        fields["forbid"] = ("n1",)
    elif name == "accuracy":
        fields = {"min_accuracy": 0.8, "min_replicas": 1, "pin": ("n0",), "forbid": ("n0",)}
    elif name == "spread":
        fields = {"spread": Spread(over="node", min_domains=2), "pin": ("n0",)}
    elif name == "attainment":
        settings, rate = replace(QUIET, attainment=0.9), 1000.0
        fields = {}
    elif name == "loss":
        settings = replace(QUIET, attainment=0.9, keep_after_loss=0.9)
        fields = {"max_gpus": 1}
    elif name == "variant":
        fields = {"min_accuracy": 0.92, "min_replicas": 1}
    services = [latency_service("s", ("huge", 0.95), ("m", 0.9), **fields), latency_service("t", ("m", 0.9))]
    return problem(
        cluster(*nodes),
        services,
        [profile("m"), profile("huge", weights_gib=40.0)],
        demand(s=rate, t=1.0),
        settings=settings,
    )


CASES = ("budget", "forbid", "accuracy", "spread", "attainment", "loss", "variant")


@pytest.mark.parametrize("name", CASES)
def test_the_set_conflicts_and_without_any_member_it_does_not(name: str) -> None:
    wanted = over_constrained(name)
    result = solve(wanted)
    assert isinstance(result, Infeasible)
    found = [(each.service, each.field) for each in result.conflicts.members]
    assert result.conflicts.minimal
    assert found

    def feasible(kept: list[tuple[str, str]]) -> bool:
        space = only(wanted, kept)
        answer = solver("scip").solve(Formulation(space, space.singles).model, Budget(time_limit_s=20))
        return isinstance(answer, Solution)

    assert not feasible(found)
    for member in found:
        assert feasible([each for each in found if each != member]), member


@pytest.mark.parametrize("name", ["budget", "attainment", "loss", "variant"])
def test_what_the_least_relaxation_leaves_can_be_planned(name: str) -> None:
    wanted = over_constrained(name)
    found = explain_infeasible(wanted, clock=time.monotonic, time_limit_s=20.0)
    assert found.conflicts is not None
    assert found.relaxation
    assert found.least
    services, settings = list(wanted.services.services), wanted.settings
    for each in found.relaxation:
        if not each.service:
            settings = replace(settings, **{each.field: each.possible})
        else:
            position = next(i for i, service in enumerate(services) if service.name == each.service)
            services[position] = services[position].model_copy(
                update={each.field: each.possible if each.field == "min_accuracy" else round(each.possible)}
            )
    relaxed = replace(wanted, services=Services(services=tuple(services)), settings=settings)
    assert isinstance(solve(relaxed), Solved)


def test_the_relaxation_is_as_small_as_it_can_be() -> None:
    (step,) = explain_infeasible(over_constrained("budget"), clock=time.monotonic, time_limit_s=20.0).relaxation
    # One replica of two less is half of what is asked; one GPU more is as much again as the budget.
    assert (step.field, step.stated, step.possible) == ("min_replicas", 2.0, 1.0)
    assert str(step) == "s.min_replicas: 2 -> 1"


def test_a_feasible_problem_has_nothing_to_relax() -> None:
    wanted = problem(cluster(("a", "gpu", 1)), [latency_service("s", ("m", 1.0))], [profile("m")], demand(s=1.0))
    assert explain_infeasible(wanted, clock=time.monotonic, time_limit_s=5.0) == Infeasibility(
        conflicts=None, kept=True
    )


def test_what_is_proven_and_what_the_time_did_not_suffice_for_are_told_apart() -> None:
    (proven,) = Infeasibility(conflicts=None, kept=True).lines()
    assert proven == "nothing conflicts: there is a plan that keeps all of these limits"
    (unknown,) = Infeasibility(conflicts=None).lines()
    assert "nor that all of these limits can be kept; a longer --time-limit may tell" in unknown


def crowded(services: int = 6, **fields: object) -> Problem:
    """Return more demand, for an attainment of 95 %, than two GPUs serve; ``fields`` are those of the first service."""
    return problem(
        cluster(("n0", "gpu", 1), ("n1", "gpu", 1)),
        [latency_service(f"s{index}", ("m", 0.9), **({} if index else fields)) for index in range(services)],
        [profile("m")],
        demand(**{f"s{index}": 100.0 for index in range(services)}),
        settings=replace(QUIET, attainment=0.95),
    )


class Clock:
    """A clock that moves on by a second whenever it is read."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


@pytest.mark.parametrize("seconds", [2.0, 20.0, 40.0, 80.0])
def test_when_time_runs_out_what_is_named_still_conflicts_and_is_not_called_irreducible(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, clock, left = crowded(min_replicas=1, max_gpus=1), Clock(), []
    solve_in_time = LimitModels.solve

    def recorded(models: LimitModels, *rest: float) -> object:
        left.append(models.left_s)
        return solve_in_time(models, *rest)

    monkeypatch.setattr(LimitModels, "solve", recorded)
    found = explain_infeasible(wanted, clock=clock, time_limit_s=seconds).conflicts
    assert found is not None
    assert not found.minimal
    assert "time ran out: the set may be larger than needed" in found.title
    space = only(wanted, [(each.service, each.field) for each in found.members])
    answer = solver("scip").solve(Formulation(space, space.singles).model, Budget(time_limit_s=20))
    assert isinstance(answer, InfeasibleModel)
    # No model is solved any more when time is over; reading the clock in between takes two of these seconds.
    assert all(each > -3.0 for each in left)


def test_even_without_time_a_conflict_of_two_limits_among_many_is_told_from_the_others() -> None:
    services = [latency_service(f"s{index}", ("m", 0.9), min_replicas=1) for index in range(12)]
    services.append(latency_service("odd", ("m", 0.9), min_replicas=3, max_gpus=2))
    wanted = problem(
        cluster(*((f"n{index}", "gpu", 1) for index in range(4))),
        services,
        [profile("m")],
        demand(**{service.name: 1.0 for service in services}),
    )
    found = explain_infeasible(wanted, clock=Clock(), time_limit_s=1.0).conflicts
    assert found is not None
    assert {(each.service, each.field) for each in found.members} == {("odd", "min_replicas"), ("odd", "max_gpus")}
    assert not found.minimal


def test_with_time_the_same_set_is_irreducible() -> None:
    found = explain_infeasible(crowded(), clock=time.monotonic, time_limit_s=20.0).conflicts
    assert found is not None
    assert found.minimal
    assert {each.field for each in found.members} == {"attainment"}
    assert len(found.members) < 6


def test_a_service_that_cannot_have_what_it_asks_for_alone_is_named_before_a_crowd() -> None:
    found = explain_infeasible(crowded(min_replicas=3), clock=time.monotonic, time_limit_s=20.0).conflicts
    assert found is not None
    assert [(each.service, each.field) for each in found.members] == [("s0", "min_replicas")]


def over_classes_alone(space: PlanningSpace, classes: Sequence[GroupClass]) -> Formulation:
    assert classes is space.classes, "built over groups"
    return Formulation(space, classes)


def test_no_model_over_groups_is_built_beyond_the_largest_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (limits_module, relaxation_module):
        monkeypatch.setattr(module, "LARGEST_EXACT_MODEL", 0)
        monkeypatch.setattr(module, "Formulation", over_classes_alone)
    found = explain_infeasible(over_constrained("budget"), clock=time.monotonic, time_limit_s=20.0)
    assert found.conflicts is not None
    assert {each.field for each in found.conflicts.members} == {"min_replicas", "max_gpus"}
    # What fits over classes need not fit on single groups.
    assert not found.conflicts.minimal
    assert found.relaxation == ()


@pytest.mark.parametrize("members", [3, 60, 300])
def test_an_answer_fits_a_screen_whatever_it_names(members: int) -> None:
    named = [f"a-service-with-quite-a-long-name-{index}" for index in range(members)]
    conflicts = Conflicts(
        members=tuple(
            Conflict(service=name, field=field, detail=f"needs {index} of something that takes a few words to say")
            for field in ("min_replicas", "attainment", "max_gpus", "pin", "forbid", "min_accuracy", "spread")
            for index, name in enumerate(named)
        ),
        minimal=False,
    )
    steps = tuple(Relaxation(service=name, field="min_replicas", stated=2.0, possible=1.0) for name in named)
    lines = list(Infeasibility(conflicts=conflicts, relaxation=steps).lines())
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    assert sum("services (" in line for line in lines) == (7 if members > 3 else 0)


def test_a_required_share_is_relaxed_as_the_one_number_that_it_is_and_never_below_nothing() -> None:
    wanted = problem(
        cluster(("n0", "gpu", 1)),
        [latency_service("s", ("huge", 0.9)), latency_service("t", ("m", 0.9))],
        [profile("m"), profile("huge", weights_gib=40.0)],
        demand(s=1.0, t=1.0),
        settings=replace(QUIET, attainment=0.8),
    )
    (step,) = explain_infeasible(wanted, clock=time.monotonic, time_limit_s=20.0).relaxation
    assert (step.service, step.field, step.stated, step.possible) == ("", "attainment", 0.8, 0.0)
    assert str(step) == "attainment: 0.8 -> 0"


def test_what_the_relaxation_says_is_possible_is_what_the_conflict_says_is_possible() -> None:
    wanted = over_constrained("attainment")
    wanted = replace(wanted, demand=demand(s=1000.0))
    found = explain_infeasible(wanted, clock=time.monotonic, time_limit_s=20.0)
    (step,) = found.relaxation
    assert found.conflicts is not None
    (conflict,) = found.conflicts.members
    assert f"at most {step.possible:.2%} can be" in conflict.detail


def test_one_number_of_two_that_are_multiplied_is_relaxed_where_that_changes_less() -> None:
    """What has to survive a loss is a share of what has to be served: the relaxation of both is not linear."""
    wanted = problem(
        cluster(("n0", "gpu", 1), ("n1", "gpu", 1)),
        [latency_service("s", ("m", 0.9))],
        [profile("m")],
        demand(s=480.0),
        settings=replace(QUIET, attainment=0.97, keep_after_loss=0.9),
    )
    most_rps = max(build_space(wanted).sustained_rps)
    found = explain_infeasible(wanted, clock=time.monotonic, time_limit_s=20.0)
    (step,) = found.relaxation
    # Of two nodes with one GPU each one is left, and serves 0.9 times what is required.
    assert step.field == "attainment"
    assert step.possible == pytest.approx(most_rps / 0.9 / 480.0, abs=1e-4)


def test_a_number_is_printed_no_higher_than_it_is_possible() -> None:
    assert (
        str(Relaxation(service="", field="attainment", stated=0.95, possible=0.91766)) == "attainment: 0.95 -> 0.9176"
    )


def test_a_skew_grows_as_far_as_it_has_to_where_nothing_else_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    every = relaxation_module._numbers
    monkeypatch.setattr(
        relaxation_module,
        "_numbers",
        lambda *given: (each for each in every(*given) if each.field == "spread.max_skew"),
    )
    wanted = problem(
        cluster(("n0", "gpu", 4), ("n1", "gpu", 1)),
        [
            latency_service("s", ("m", 0.9), min_replicas=4, spread=Spread(over="node", max_skew=2)),
            latency_service("t", ("fat", 0.9), min_replicas=1, pin=("n1",)),
        ],
        [profile("m", weights_gib=8.0), profile("fat", weights_gib=10.0)],
        demand(s=1.0, t=1.0),
    )
    (step,) = explain_infeasible(wanted, clock=time.monotonic, time_limit_s=20.0).relaxation
    assert (step.service, step.field, step.stated, step.possible) == ("s", "spread.max_skew", 2.0, 4.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_set_of_a_generated_problem_is_irreducible(seed: int) -> None:
    wanted = generated(seed, services=4, nodes=3, load=6.0)
    wanted = replace(wanted, settings=replace(wanted.settings, attainment=0.99))
    found = explain_infeasible(wanted, clock=time.monotonic, time_limit_s=30.0).conflicts
    assert found is not None
    assert found.minimal
    named = [(each.service, each.field) for each in found.members]

    def answer(kept: list[tuple[str, str]]) -> object:
        space = only(wanted, kept)
        return solver("scip").solve(Formulation(space, space.singles).model, Budget(time_limit_s=20))

    assert isinstance(answer(named), InfeasibleModel)
    for member in named:
        assert isinstance(answer([each for each in named if each != member]), Solution), member
