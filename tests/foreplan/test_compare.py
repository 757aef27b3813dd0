"""Policies side by side: everybody gets the same, nothing is run twice, and nobody beats hindsight."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from evaluator import Settings as SimulationSettings
from evaluator.control import Observation, ServiceObservation
from evaluator.policy import Decision, Undecided
from foreplan.batch import Context, run_batch
from foreplan.changes import failures_of, plan_change_of
from foreplan.compare import Point, Study, compare, policy, regret, render
from foreplan.compare.page import rows
from foreplan.compare.replanning import Replanner
from planner import Settings
from plans.errors import InvalidInput
from plans.service import Services
from profiles.library import ProfileLibrary
from tests.planner.problems import cluster, latency_service, profile
from traces.synthesis import Gamma, synthesise

NAMES = ("a", "b")
POINTS = (Point(), Point(load=2.0), Point(slo_scale=0.5), Point(burstiness_cv=3.0))


@pytest.fixture(scope="module")
def study():
    loads = {name: Gamma(rate_rps=40, cv=2) for name in NAMES}
    wanted = [latency_service(name, (f"model-{name}", 0.9), deadline_s=0.1) for name in NAMES]
    return Study(
        cluster=cluster(("node-0", "gpu", 2), memory_gib=12),
        services=Services(services=tuple(wanted)),
        profiles=ProfileLibrary([profile(f"model-{name}", weights_gib=4.0) for name in NAMES]),
        history=synthesise(loads, duration_s=20, seed=1),
        served=synthesise(loads, duration_s=20, seed=2),
        planning=Settings(time_limit_s=2.0, seed=1),
        simulation=SimulationSettings(),
    )


@pytest.fixture(scope="module")
def outcomes(study):
    return compare(study, ["ilp", "round-robin", "random"], POINTS, seeds=2)


def test_an_unknown_policy_is_named_before_anything_runs(study):
    with pytest.raises(InvalidInput, match="round-robbin"):
        compare(study, ["round-robin", "round-robbin"], POINTS, seeds=1)
    with pytest.raises(InvalidInput, match="selective-replication"):
        policy("best", study.planning, 0.0)
    with pytest.raises(InvalidInput, match="at least one policy"):
        compare(study, [], POINTS, seeds=1)


def test_there_is_one_outcome_per_policy_and_point_with_a_sample_per_seed(outcomes):
    assert [(each.policy, each.point) for each in outcomes] == [
        (name, point) for point in POINTS for name in ("ilp", "round-robin", "random")
    ]
    assert all([sample.seed for sample in each.samples] == [0, 1] for each in outcomes)
    assert all(0 <= sample.attainment <= 1 for each in outcomes for sample in each.samples)


def test_seed_0_serves_the_recorded_trace_and_others_a_resampled_one(study):
    assert study.at(Point(), 0).served == study.served
    assert study.at(Point(), 1).served != study.served
    assert study.at(Point(), 1).served.duration_s == study.served.duration_s
    assert study.at(Point(), 1).history == study.history


def test_deadlines_and_load_are_scaled_for_everybody(study):
    scaled = study.at(Point(load=2.0, slo_scale=0.5), 0)
    assert [service.slo.deadline_s for service in scaled.services.services] == [0.05, 0.05]
    assert len(scaled.served) == 2 * len(study.served)
    assert len(scaled.history) == 2 * len(study.history)


def test_the_same_comparison_gives_the_same_outcome(study, outcomes):
    again = compare(study, ["round-robin", "random"], POINTS[:1], seeds=2)
    assert [each.samples for each in again] == [each.samples for each in outcomes[1:3]]


def test_what_was_kept_is_taken_and_another_study_is_not(study, tmp_path):
    compare(study, ["round-robin"], POINTS[:1], seeds=1, kept=tmp_path)
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    result["gpus"] = 77
    path.write_text(json.dumps(result))
    assert compare(study, ["round-robin"], POINTS[:1], seeds=1, kept=tmp_path)[0].gpus == 77
    other = dataclasses.replace(study, simulation=SimulationSettings(overhead_s=0.01))
    assert compare(other, ["round-robin"], POINTS[:1], seeds=1, kept=tmp_path)[0].gpus == 2


def test_nobody_beats_hindsight_nor_hindsight_the_bound(study, outcomes):
    for point in POINTS[:2]:
        found = regret(study, outcomes, point)
        assert found.regret.keys() == {"ilp", "round-robin", "random"}
        assert all(-1e-9 <= share <= 1 for share in found.regret.values())
        assert found.bound_rps is not None
        assert found.best_rps <= found.bound_rps * (1 + 1e-9)


def test_answers_after_the_last_arrival_do_not_lower_goodput(study, outcomes):
    """Law: goodput is attainment times the rate of the arrivals, which are the same for everybody."""
    for outcome in outcomes[:3]:
        for seed, sample in enumerate(outcome.samples):
            served = study.at(POINTS[0], seed).served
            assert sample.goodput_rps == pytest.approx(sample.attainment * len(served) / served.duration_s)


def test_the_page_and_the_table_tell_every_outcome(study, outcomes):
    found = regret(study, outcomes, POINTS[0])
    table = rows(outcomes, [found])
    assert len(table) == len(outcomes)
    assert table[0][5] == ""
    assert table[1][5][0] in "+-"
    page = render("Policies", outcomes, [found], ["a remark"])
    for heading in ("against load", "against deadlines", "against burstiness", "Latency", "over time", "Regret"):
        assert heading in page
    assert "a remark" in page
    assert "ilp by least-finish (`foreplan gateway --routing least-finish`)" in page
    assert "random by weighted-random (simulated only)" in page
    assert page.count("Of seed 0 at load 1, SLO scale 1, burstiness as recorded.") == 2
    assert '"ticktext":["0.001","0.002","0.005"' in page


def test_the_axis_of_burstiness_shows_the_recorded_trace_and_bars_end_at_everything(outcomes):
    page = render("Policies", outcomes, [], [])
    figures = [
        json.loads(text) for text in re.findall(r'Plotly\.newPlot\(\s*"[^"]+",\s*(\[.*?\]),\s*\{"', page, re.DOTALL)
    ]
    along = next(lines for lines in figures if "cv 3" in lines[0]["x"])
    assert all(line["x"] == ["as recorded", "cv 3"] for line in along)
    for line in (line for lines in figures for line in lines if "error_y" in line):
        assert all(y + up <= 100 + 1e-9 for y, up in zip(line["y"], line["error_y"]["array"], strict=True))


def test_a_policy_that_serves_nothing_is_shown_and_a_bound_that_others_exceed_is_not(study):
    """No latency fits the deadline of 1 ms, so the ILP places nothing, and neither would hindsight."""
    hopeless = study.at(Point(slo_scale=0.01), 0)
    (found,) = compare(hopeless, ["ilp"], POINTS[:1], seeds=1)
    assert found.attainments == [0.0]
    assert set(found.samples[0].latency_s) == {None}
    served = dataclasses.replace(
        found, policy="wonder", samples=(dataclasses.replace(found.samples[0], attainment=0.5),)
    )
    lost = regret(hopeless, [found, served], POINTS[0])
    assert (lost.best, lost.bound_rps, lost.regret) == ("wonder", None, {"ilp": 1.0, "wonder": 0.0})


def test_policies_plan_for_what_a_trace_of_workflows_calls(study):
    edges = [{"from": "a", "to": "b"}]
    flow = {"name": "flow", "slo": {"deadline": 0.3}, "edges": edges}
    flowing = dataclasses.replace(
        study,
        services=Services.model_validate({**study.services.model_dump(by_alias=True), "workflows": [flow]}),
        history=synthesise({"flow": Gamma(rate_rps=20, cv=2)}, duration_s=10, seed=1),
        served=synthesise({"flow": Gamma(rate_rps=20, cv=2)}, duration_s=10, seed=2),
        polish_s=0.2,
        replan_s=4.0,
    )
    found = compare(flowing, ["foreplan", "least-loaded"], POINTS[:1], seeds=1)
    assert all(each.attainments[0] > 0.9 for each in found)
    assert regret(flowing, found, POINTS[0]).bound_rps == pytest.approx(len(flowing.served) / 10)


def test_a_batch_runs_every_plan_on_every_trace_and_seed(study, tmp_path):
    context = Context(services=study.services, settings=SimulationSettings())
    plans = {
        name: policy(name, study.planning, 0.0).decide(situation(study)).plan for name in ("random", "round-robin")
    }
    traces = {"history": study.history, "served": study.served}
    runs = run_batch(context, plans, traces, seeds=2, kept=tmp_path)
    assert [(run["plan"], run["trace"], run["seed"]) for run in runs] == [
        (plan, trace, seed) for plan in plans for trace in traces for seed in (0, 1)
    ]
    assert len(list(tmp_path.iterdir())) == 8
    assert run_batch(context, plans, traces, seeds=2, kept=tmp_path) == runs


def situation(study):
    from evaluator.policy import Situation
    from traces.demand import observed_demand

    return Situation(
        cluster=study.cluster,
        services=study.services,
        profiles=study.profiles,
        demand=observed_demand(study.history, window_s=20),
        history=study.history,
    )


def observed(study, plan, rates, *, down=()):
    services = {
        name: ServiceObservation(arrived=int(10 * rate), good=0, late=0, dropped=0, failed=0, queued=0)
        for name, rate in rates.items()
    }
    return Observation(now_s=20.0, since_s=10.0, plan=plan, services=services, queued={}, down=frozenset(down))


class Spy:
    name = "spy"

    def __init__(self, plan):
        self.plan = plan

    def decide(self, situation):
        self.seen = situation
        return Decision(plan=self.plan)


def test_a_policy_that_plans_again_sees_the_rates_of_the_last_interval_and_is_charged_its_time(study):
    times = iter([100.0, 100.25])
    plan = policy("random", study.planning, 0.0).decide(situation(study)).plan
    spy = Spy(plan)
    replanner = Replanner(spy, situation(study), clock=lambda: next(times))
    empty = plan.model_copy(update={"groups": (), "routes": {}})
    turn = replanner.observe(observed(study, empty, {"a": 200.0, "b": 1.0}))
    assert (turn.solve_s, turn.plan) == (0.25, plan)
    assert [spy.seen.demand.of(name).peak_rps(0.5) for name in NAMES] == [200.0, 1.0]
    assert spy.seen.current == empty


def test_a_policy_that_would_change_nothing_and_one_without_nodes_leave_things_as_they_are(study):
    replanner = Replanner(policy("round-robin", study.planning, 0.0), situation(study))
    plan = policy("round-robin", study.planning, 0.0).decide(situation(study)).plan
    assert replanner.observe(observed(study, plan, {"a": 40.0, "b": 40.0})) is None
    assert replanner.observe(observed(study, plan, {"a": 1.0, "b": 1.0}, down=["node-0"])) is None


def test_a_policy_that_finds_no_plan_leaves_the_one_in_force(study):
    class Clueless:
        name = "clueless"

        def decide(self, situation):
            raise Undecided.of("a feasible problem")

    plan = policy("round-robin", study.planning, 0.0).decide(situation(study)).plan
    assert Replanner(Clueless(), situation(study)).observe(observed(study, plan, {"a": 1.0, "b": 1.0})) is None


def test_replanning_runs_inside_the_comparison(study):
    again = dataclasses.replace(study, replan_s=5.0)
    (outcome,) = compare(again, ["ilp"], POINTS[:1], seeds=1)
    assert outcome.samples[0].attainment > 0.9


@pytest.mark.parametrize(
    "text", ["", "node-a", "node-a@", "node-a@x", "node-a@60-", "node-a@60-50", "@60", "node-a/x@60", "node-a@nan"]
)
def test_a_failure_that_cannot_be_read_says_how_it_is_spelled(text):
    with pytest.raises(InvalidInput, match="--fail"):
        failures_of(text)


def test_failures_are_read():
    (failure,) = failures_of("node-a/3@60")
    assert (failure.at_s, failure.node, failure.gpu) == (60.0, "node-a", 3)
    failure, recovery = failures_of("node-a@1.5-2e2")
    assert (failure.at_s, failure.gpu, recovery.at_s) == (1.5, None, 200.0)


@pytest.mark.parametrize("text", ["", "60", "=plan.json", "x=plan.json", "-1=plan.json"])
def test_a_change_of_plan_that_cannot_be_read_says_how_it_is_spelled(text):
    with pytest.raises(InvalidInput, match="--then"):
        plan_change_of(text)


def test_the_command_line_offers_what_the_evaluator_does():
    from typing import get_args

    from evaluator import settings, simulation
    from foreplan.cli import evaluate_commands

    for name in ("Routing", "Order", "Admission", "Latency"):
        assert get_args(getattr(evaluate_commands, name)) == get_args(getattr(settings, name))
    assert get_args(evaluate_commands.Mode) == get_args(simulation.Mode)
