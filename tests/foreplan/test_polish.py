"""Polish from documents to the checked plan: what it gains, what it says, and that it repeats."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evaluator.single_pass import SinglePassTrace, compile_hosts, count_good
from foreplan.planning import Inputs, make_plan, verify
from foreplan.polish import PolishSettings, polished
from foreplan.polish_scorers import EventScorer, SinglePassScorer, scorer_for
from planner import Problem, ScoringTables, Settings
from planner.scoring import Deployment
from plans.demand import Demand, Rate, ServiceDemand
from plans.errors import InvalidInput
from plans.service import Services
from profiles.library import ProfileLibrary
from tests.foreplan.workspace import Workspace
from tests.planner.problems import cluster, latency_service, profile
from traces.demand import observed_demand
from traces.synthesis import Diurnal, Gamma, synthesise

NAMES = [f"s{index}" for index in range(6)]
ALL_SHAPES = ((1, 1), (1, 2), (1, 4))


def toy(*, batches=(1,), growth=0.9, rate_rps=2.5, cv=5.0, shapes=ALL_SHAPES):
    """Six equal, bursty services on four GPUs; three models fit on a GPU, and all of them on a pipeline."""
    return Inputs(
        cluster=cluster(("n", "gpu", 4), memory_gib=12),
        services=Services(services=tuple(latency_service(name, (f"m-{name}", 1.0), deadline_s=0.5) for name in NAMES)),
        profiles=ProfileLibrary(
            [
                profile(f"m-{name}", base_s=0.1, growth=growth, weights_gib=3.5, batches=batches, parallelisms=shapes)
                for name in NAMES
            ]
        ),
        demand=Demand(
            window_s=60.0,
            services=tuple(
                ServiceDemand(service=name, burstiness_cv=cv, rate_rps=(Rate(mean=rate_rps),)) for name in NAMES
            ),
        ),
    )


SETTINGS = Settings(time_limit_s=3.0, gap=0.01)
REPEATABLE = PolishSettings(time_s=1e6, candidates=250, traces=6)


def bursts(seed, *, rate_rps=2.5, cv=5.0, duration_s=1500):
    return synthesise({name: Gamma(rate_rps=rate_rps, cv=cv) for name in NAMES}, duration_s=duration_s, seed=seed)


def attainment(plan, inputs, trace):
    service = np.array([NAMES.index(name) for name in trace.services])[trace.codes]
    arrivals = SinglePassTrace.whole(trace.arrival_s, service)
    return count_good(compile_hosts(plan, inputs.services), arrivals).sum() / len(trace)


def test_polish_beats_the_fluid_plan_on_bursts_that_it_has_not_seen():
    """By ten points and more, under a better router than the one that it was scored with."""
    inputs = toy()
    fluid = make_plan(inputs, SETTINGS).plan
    better = make_plan(inputs, SETTINGS, REPEATABLE).plan
    fresh = bursts(99)
    assert attainment(better, inputs, fresh) > attainment(fluid, inputs, fresh) + 0.1
    assert any(group.pp > 1 for group in better.groups)
    assert verify(better, inputs.cluster, inputs.services, inputs.profiles, inputs.demand) == ()


def test_the_plan_says_how_it_was_polished_and_predicts_with_an_interval():
    inputs = toy()
    plan = make_plan(inputs, SETTINGS, REPEATABLE).plan
    assert plan.polish is not None
    assert plan.polish.scorer.startswith("single pass")
    assert plan.polish.arrivals == "renewal processes at the planned rates"
    assert plan.polish.attainment >= plan.polish.start_attainment
    predicted = []
    for prediction in plan.predicted:
        low, high = prediction.attainment_interval
        assert low <= prediction.attainment <= high
        predicted.append(prediction.attainment)
    # Other arrivals of the same kind: the prediction does not grade itself.
    assert attainment(plan, inputs, bursts(7, duration_s=6000)) == pytest.approx(np.mean(predicted), abs=0.06)


def test_the_same_seed_gives_the_same_plan():
    first, again = (make_plan(toy(), SETTINGS, REPEATABLE).plan for _ in range(2))
    assert first.placement_digest == again.placement_digest
    assert first.predicted == again.predicted


def test_without_time_for_it_the_plan_is_the_solvers():
    plain = make_plan(toy(), SETTINGS).plan
    off = make_plan(toy(), SETTINGS, PolishSettings(time_s=0)).plan
    assert off.placement_digest == plain.placement_digest
    assert off.polish is None
    assert all(prediction.attainment_interval is None for prediction in off.predicted)


def test_arrivals_come_from_the_trace_and_its_character_decides_how():
    inputs = toy()
    wave = Diurnal(mean_rps=3, amplitude_ratio=1.0, period_s=500)
    waves = synthesise(dict.fromkeys(NAMES, wave), duration_s=500, seed=1)
    for trace, words in ((bursts(3), "fitted"), (waves, "windows")):
        seen = Inputs(
            cluster=inputs.cluster,
            services=inputs.services,
            profiles=inputs.profiles,
            demand=observed_demand(trace, window_s=60),
        )
        plan = make_plan(seen, SETTINGS, REPEATABLE, trace).plan
        assert words in plan.polish.arrivals


def test_batches_that_matter_are_simulated_by_the_event_engine():
    inputs = toy(batches=(1, 2, 4), growth=0.1, rate_rps=8.0)
    few = PolishSettings(time_s=1e6, candidates=25, traces=3)
    plan = make_plan(inputs, SETTINGS, few).plan
    assert plan.polish.scorer.startswith("event engine")
    assert plan.polish.attainment >= plan.polish.start_attainment
    assert max(entry.max_batch for group in plan.groups for entry in group.loadout) > 1


def tables_and_blocks(batch_stage_s=None):
    tables = ScoringTables(
        names=("a", "b"),
        stage_s=np.array([[0.1, 0.0], [0.05, 0.05]]),
        batch_stage_s=batch_stage_s,
        max_batch=np.array([1, 1]),
        deadline_s=np.array([0.3, 0.3]),
        offered_rps=np.array([5.0, 5.0]),
        gpus=4,
    )
    generator = np.random.default_rng(1)
    blocks = SinglePassTrace(
        arrival_s=np.concatenate([np.sort(generator.random(60)) * 8 for _ in range(5)]),
        service=generator.integers(0, 2, 300).astype(np.int32),
        first=np.arange(0, 301, 60, dtype=np.int64),
    )
    return tables, blocks


def test_both_engines_count_alike_where_both_apply():
    """One group, batches of one, one deadline: whether hopeless requests are dropped early or late does not matter."""
    tables, blocks = tables_and_blocks()
    batched, _ = tables_and_blocks(tables.stage_s[:, None, :].copy())
    hosts = Deployment(
        count=np.array([1, 1], dtype=np.int32),
        slot=np.array([[2, 0], [2, 0]], dtype=np.int32),
        option=np.array([[1, 0], [1, 0]], dtype=np.int32),
    )
    single, event = scorer_for(tables, blocks, "least-finish"), scorer_for(batched, blocks, "least-finish")
    assert isinstance(single, SinglePassScorer)
    assert isinstance(event, EventScorer)
    everything = {"rival": np.zeros(5), "needed": -np.inf, "start": 0, "least": 5}
    one, two = (scorer.race(hosts, np.ones(2), **everything) for scorer in (single, event))
    assert one.good.sum(axis=1).tolist() == two.good.sum(axis=1).tolist()
    assert one.value.tolist() == two.value.tolist()


def test_the_event_engine_gives_a_hopeless_candidate_up_and_scores_nothing_without_replicas():
    tables, blocks = tables_and_blocks(np.array([[[0.1, 0.0]], [[0.05, 0.05]]]))
    nothing = Deployment(
        count=np.zeros(2, dtype=np.int32),
        slot=np.zeros((2, 4), dtype=np.int32),
        option=np.zeros((2, 4), dtype=np.int32),
    )
    scorer = scorer_for(tables, blocks, "least-finish")
    heat = scorer.race(nothing, np.ones(2), rival=np.full(5, 40.0), needed=0.0, start=1, least=3)
    assert heat.blocks == 3
    assert heat.value.sum() == 0


def test_impossible_settings_are_refused_all_at_once():
    with pytest.raises(InvalidInput) as refused:
        PolishSettings(time_s=-1, traces=2, candidates=0, routing="luck")
    assert {fault.field for fault in refused.value.faults} == {"time_s", "traces", "candidates", "routing"}


def test_what_may_not_be_polished_comes_back_as_it_was_with_a_warning():
    inputs = toy()
    plan = make_plan(inputs, SETTINGS).plan
    fair = Problem(
        cluster=inputs.cluster,
        services=inputs.services,
        profiles=inputs.profiles,
        demand=inputs.demand,
        settings=Settings(objective="max-min"),
    )
    same = polished(fair, plan, REPEATABLE, None)
    assert same.groups == plan.groups
    assert "not polished: it raises goodput" in same.warnings[-1]


def test_the_record_survives_the_file():
    plan = make_plan(toy(), SETTINGS, REPEATABLE).plan
    assert type(plan).model_validate(json.loads(plan.model_dump_json(by_alias=True))) == plan


def test_the_command_polishes_and_says_so(tmp_path):
    workspace = Workspace.make(tmp_path)
    shown = json.loads(workspace.plan("--polish", "1", "--polish-traces", "3", "--json").stdout)
    assert shown["polish"]["attainment"] >= shown["polish"]["start_attainment"]
    assert shown["polish"]["traces"] == 3
    assert "polished by" in workspace.plan("--polish", "1", "--polish-traces", "3").stdout


def test_the_command_refuses_fewer_traces_than_can_be_compared(tmp_path):
    result = Workspace.make(tmp_path).plan("--polish", "1", "--polish-traces", "2", code=2)
    assert "polish-traces" in result.stderr
