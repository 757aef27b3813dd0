from __future__ import annotations

from dataclasses import replace

import pytest

from planner import Solved, solve
from planner.problem import Problem
from planner.space import build_space
from plans.plan import Unserved
from plans.service import Edge, LatencySlo, Workflow
from tests.planner.problems import QUIET, cluster, crowd, demand, latency_service, problem, profile


def outcome(wanted: Problem) -> tuple[Unserved, ...]:
    result = solve(wanted)
    assert isinstance(result, Solved)
    return result.plan.unserved


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


def bound(wanted: Problem, service: str = "s") -> Unserved:
    (left,) = (each for each in outcome(wanted) if each.service == service)
    return left


def test_a_single_replica_that_no_loss_may_take_names_keep_after_loss_and_the_budget() -> None:
    wanted = crowd(latency_service("s", ("m", 1.0), max_gpus=1), s=5.0)
    left = bound(replace(wanted, settings=replace(QUIET, keep_after_loss=0.9)))
    assert (left.rate_rps, left.reason) == (5.0, "budget")
    expected = "keep_after_loss asks that 90% of it outlive the loss of any node, but max_gpus 1 leaves it one replica"
    assert left.detail.startswith(expected)


def test_a_service_that_one_node_can_run_names_keep_after_loss_and_the_node() -> None:
    wanted = crowd(latency_service("s", ("m", 1.0), pin=("a",)), s=5.0)
    left = bound(replace(wanted, settings=replace(QUIET, keep_after_loss=0.9)))
    assert left.reason == "budget"
    assert left.detail.endswith("outlive the loss of any node, but only a can run it")


def test_compute_held_back_for_a_loss_is_called_that() -> None:
    wanted = crowd(latency_service("s", ("m", 1.0)), s=500.0)
    left = bound(replace(wanted, settings=replace(QUIET, keep_after_loss=0.9)))
    assert left.reason == "compute"
    assert (
        left.detail
        == "2 of its 2 groups have compute to spare, which keep_after_loss 90% holds back for the loss of a node"
    )


@pytest.mark.parametrize(
    ("objective", "words"),
    [("max-min", "max-min fairness gives compute to the services"), ("goodput", "would cost other services more")],
)
def test_a_service_within_its_budget_that_shares_its_group_names_the_objective(objective: str, words: str) -> None:
    wanted = problem(
        cluster(("a", "gpu", 1)),
        [latency_service("s", ("m", 1.0), max_gpus=1), latency_service("t", ("m", 1.0), weight=1.5)],
        [profile("m")],
        demand(s=120.0, t=100.0),
        settings=replace(QUIET, objective=objective),
    )
    left = bound(wanted)
    assert left.reason == "compute"
    assert left.detail.startswith("shares its groups with t: ")
    assert words in left.detail
    assert "runs on 1 of at most 1 GPUs (max_gpus)" in left.detail


def test_a_required_share_of_the_others_is_named_where_compute_runs_out() -> None:
    wanted = crowd(latency_service("s", ("m", 1.0)), latency_service("t", ("m", 1.0)), s=500.0, t=100.0)
    left = bound(replace(wanted, settings=replace(QUIET, attainment=0.2)))
    assert left.detail.endswith("20.00% of every service's rate come first")


def test_what_is_left_out_for_fewer_gpus_is_called_that() -> None:
    wanted = crowd(latency_service("s", ("m", 1.0)), s=250.0)
    left = bound(replace(wanted, settings=replace(QUIET, attainment=0.5, minimize="gpus")))
    assert "fewest GPUs come before serving more than the attainment asked for" in left.detail


@pytest.mark.parametrize("gpus", [1, 2])
def test_one_gpu_more_is_worth_what_an_option_on_one_gpu_serves(gpus: int) -> None:
    parallelisms = tuple((tp, 1) for tp in (1, 2) if tp >= gpus)
    wanted = problem(
        cluster(("a", "gpu", 2)),
        [latency_service("s", ("m", 1.0))],
        [profile("m", parallelisms=parallelisms)],
        demand(s=5000.0),
    )
    space = build_space(wanted)
    most = max(each.sustained_rps for each in space.options if each.gpus == gpus)
    what = "one GPU more" if gpus == 1 else "one more group of 2 GPUs"
    assert f"{what} would serve up to {most:.4g} rps of it" in bound(wanted).detail


def in_a_row(*, affinity: str = "none", stages: tuple[str, str] = ("m", "m"), rate: float = 1000.0) -> Problem:
    """Return a service s on node a that calls t, which nothing else does, on node b."""
    wanted = problem(
        cluster(("a", "gpu", 1), ("b", "gpu", 1)),
        [latency_service("s", (stages[0], 1.0), pin=("a",)), latency_service("t", (stages[1], 1.0), pin=("b",))],
        [profile("m"), profile("quick", base_s=0.001)],
        demand(s=rate),
    )
    row = Workflow(
        name="row",
        slo=LatencySlo(deadline_s=0.5),
        edges=(Edge(source="s", target="t", fanout=1.0, payload_bytes=1000),),
        affinity=affinity,  # type: ignore[arg-type]
    )
    return replace(wanted, services=wanted.services.model_copy(update={"workflows": (row,)}))


def test_a_stage_that_waits_for_its_callers_names_them() -> None:
    left = bound(in_a_row(stages=("m", "quick")), "t")
    assert left.detail.startswith("only workflows call it, and its callers are not served in full: s (")
    assert "of 1000 rps)" in left.detail


def test_a_stage_whose_calls_cannot_be_served_names_what_it_calls_and_why() -> None:
    left = bound(in_a_row(stages=("quick", "m")))
    assert left.detail.startswith("what it calls, t, cannot serve more: all 1 groups that could run it are full")


def test_calls_that_must_stay_on_one_node_are_named_where_no_node_has_room_for_both() -> None:
    left = bound(in_a_row(affinity="require", rate=5.0))
    assert left.rate_rps == 5.0
    assert left.detail == "no node has room for it and t both, and affinity keeps each call on one node"
