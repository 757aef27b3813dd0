"""Polish from documents to the checked plan: what it gains, what it says, and that it repeats."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from evaluator.single_pass import Hosts, SinglePassTrace, compile_hosts, count_good
from foreplan.planning import Inputs, make_plan, verify
from foreplan.polish import PolishSettings, polished
from foreplan.polish_arrivals import Sample, Sampler
from foreplan.polish_scorers import judge_for, scorer_for, served_by
from foreplan.polish_walk import CompiledScorer
from planner import Problem, Settings
from planner.arranged import Arrangement, Operation
from planner.polished import scoring_tables
from planner.simulated_scorer import SimulatedScorer
from planner.space import build_space
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
    assert plan.polish.scorer.startswith("single pass (admission at arrival, batches)")
    assert "event engine" in plan.polish.scorer
    assert plan.polish.attainment >= plan.polish.start_attainment
    assert max(entry.max_batch for group in plan.groups for entry in group.loadout) > 1


def scored(*, batches=(1,), routing="earliest-free", objective="goodput", seed=1):
    """A compiled scorer on the toy's arrivals, and groups of one kind with one service each."""
    inputs = toy(batches=batches, growth=0.9 if batches == (1,) else 0.1, rate_rps=4.0)
    problem = Problem(
        cluster=inputs.cluster,
        services=inputs.services,
        profiles=inputs.profiles,
        demand=inputs.demand,
        settings=Settings(objective=objective),
    )
    space = build_space(problem)
    tables = scoring_tables(space)
    blocks = Sampler(problem, None).blocks(tables, 5, 0)
    arrangement = Arrangement(space, range(len(space.options)), seed)
    scorer = scorer_for(tables, blocks, routing)
    arrangement.operate(Operation.OPEN_ALL, int(arrangement.draw() * len(arrangement.kinds)))
    scorer.glance(arrangement, None)
    assert arrangement.operate(Operation.ADMIT_WANTING)
    arrangement.forget()
    return space, tables, blocks, arrangement, scorer


def by_single_pass(tables, blocks, arrangement, routing="earliest-free"):
    """Good requests per block and service by `evaluator.single_pass`, which knows nothing of standing outcomes."""
    now = arrangement.now
    hosts = Hosts(
        count=now.replicas, group=now.slot, option=now.option, weight=np.ones(now.slot.shape), stage_s=tables.stage_s,
        deadline_s=tables.deadline_s, groups=tables.gpus,
    )  # fmt: skip
    return [
        count_good(
            hosts,
            SinglePassTrace.whole(blocks.arrival_s[first:last], blocks.service[first:last]),
            routing=routing,
        ).tolist()
        for first, last in zip(blocks.first[:-1], blocks.first[1:], strict=True)
    ]


@pytest.mark.parametrize("routing", ["earliest-free", "least-finish"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_settled_arrangement_is_scored_as_the_evaluators_single_pass_does(routing, seed):
    _, tables, blocks, arrangement, scorer = scored(routing=routing, seed=seed)
    scorer.settle(arrangement, None)
    expected = np.array(by_single_pass(tables, blocks, arrangement, routing))
    assert scorer.good(arrangement).sum(axis=1).tolist() == expected.sum(axis=0).tolist()
    assert scorer.score == pytest.approx((expected * tables.worth.value[0]).sum(axis=1))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_comes_in_the_warm_up_is_served_and_not_counted(seed):
    """Law: what counts is what a whole trace serves in time, less what its beginning does."""
    _, tables, blocks, arrangement, _ = scored(seed=seed)
    warm = replace(blocks, warmup_s=0.4 * float(blocks.arrival_s[-1]))
    scorer = scorer_for(tables, warm, "earliest-free")
    scorer.settle(arrangement, None)
    early = ~warm.counts
    beginnings = [early[first:last].sum() for first, last in zip(blocks.first[:-1], blocks.first[1:], strict=True)]
    beginning = replace(
        blocks,
        arrival_s=blocks.arrival_s[early],
        service=blocks.service[early],
        first=np.cumsum([0, *beginnings]),
    )
    expected = np.array(by_single_pass(tables, blocks, arrangement))
    expected -= np.array(by_single_pass(tables, beginning, arrangement))
    assert early.any()
    assert scorer.good(arrangement).sum(axis=1).tolist() == expected.sum(axis=0).tolist()
    assert scorer.score == pytest.approx((expected * tables.worth.value[0]).sum(axis=1))
    services = len(tables.names)
    assert (warm.offered(services) == blocks.offered(services) - beginning.offered(services)).all()
    for _ in range(5):
        scorer.walk(arrangement, 0.0, 40)
        told = scorer.score.copy()
        arrangement.forget()
        scorer.settle(arrangement, None)
        assert scorer.score.sum() == pytest.approx(told.sum(), rel=0.02)


def test_a_prediction_does_not_count_the_warm_up():
    """The same requests, some of them before the warm-up ends: offered and served are those of the rest."""
    inputs = toy()
    plan = make_plan(inputs, SETTINGS).plan
    _, tables, blocks, _, _ = scored()
    warm = replace(blocks, warmup_s=0.4 * float(blocks.arrival_s[-1]))
    found, whole = (served_by(plan, inputs.services, each) for each in (warm, blocks))
    assert (found.offered == warm.offered(len(tables.names))).all()
    assert (found.good <= found.offered).all()
    assert (found.good <= whole.good).all()
    assert 0 < found.good.sum() < whole.good.sum()


def test_traces_cut_short_by_their_number_of_requests_warm_up_and_others_need_not():
    space, tables, blocks, _, _ = scored()
    short = Sampler(space.problem, None).blocks(tables, 3, 0, most_requests=600)
    assert blocks.warmup_s == 0.0
    assert (blocks.counted == blocks.first[:-1]).all()
    assert 0 < short.warmup_s <= 0.5 * short.arrival_s.max() * 1.2
    assert (short.arrival_s[short.counted] >= short.warmup_s).all()
    assert (short.arrival_s[short.counted - 1] < short.warmup_s).all()


def test_warm_traces_flatter_less_than_such_that_start_idle():
    """Short traces under load, against one that is long: idle queues at their start serve more than there will be."""
    _, tables, _, arrangement, _ = scored()
    rng = np.random.default_rng(1)
    deadline_s = float(tables.deadline_s.max())
    slowest_s = {group: tables.stage_s[option].max() for group, option in arrangement.pairs()}
    rate_rps = 1.3 * sum(1 / each for each in slowest_s.values())

    def uniform(count, duration_s, warmup_s=0.0):
        sizes = rng.poisson(rate_rps * duration_s, count)
        return Sample(
            arrival_s=np.concatenate([np.sort(rng.uniform(0, duration_s, size)) for size in sizes]),
            service=rng.choice(np.flatnonzero(arrangement.now.replicas), sizes.sum()).astype(np.int32),
            first=np.cumsum([0, *sizes]),
            warmup_s=warmup_s,
        )

    def share(blocks):
        scorer = scorer_for(tables, blocks, "earliest-free")
        return scorer.good(arrangement).sum() / blocks.offered(len(tables.names)).sum()

    true = share(uniform(3, 1000 * deadline_s))
    short = uniform(300, 3 * deadline_s)
    idle, warm = share(short), share(replace(short, warmup_s=1.5 * deadline_s))
    assert idle > true + 0.05
    assert abs(warm - true) < 0.5 * (idle - true)


def test_walking_accepts_moves_and_its_score_is_that_of_simulating_what_stands_in_full():
    """Every group is one that the services choose among here, so that nothing is approximate."""
    _, _, _, arrangement, scorer = scored()
    scorer.settle(arrangement, None)
    before, pairs = float(scorer.score.sum()), arrangement.pairs()
    for _ in range(10):
        assert scorer.walk(arrangement, 0.0, 40)[1] > 0
        told = scorer.score.copy()
        arrangement.forget()
        scorer.settle(arrangement, None)
        assert scorer.score.sum() == pytest.approx(told.sum(), rel=0.02)
    assert arrangement.pairs() != pairs
    assert scorer.score.sum() > before


def test_a_move_is_simulated_where_it_matters_and_nowhere_else():
    """Two services on GPUs of their own: what one is given does not touch the standing outcome of the other."""
    space, _, _, arrangement, scorer = scored()
    single = [group for group in range(len(space.groups)) if len(space.groups[group].gpus) == 1]
    option_of = {int(space.service_of[option]): option for option in space.groups[single[0]].options}
    arrangement.restore([(single[0], option_of[0]), (single[1], option_of[1])])
    scorer.settle(arrangement, None)
    alone = scorer.good(arrangement).sum(axis=1)
    arrangement.operate(Operation.PLACE, single[2], option_of[1])
    scorer.settle(arrangement, 0)
    concerned = np.flatnonzero(scorer._ledger.within).tolist()
    assert concerned == sorted(int(arrangement.now.slot_of[group]) for group in single[1:3])
    locally = scorer.score.copy()
    more = scorer.good(arrangement).sum(axis=1)
    assert scorer.score.tolist() == locally.tolist()
    assert more[0] == alone[0] > 0
    assert more[1] > alone[1]


def test_all_candidates_meet_the_same_arrivals_which_tells_them_apart_sooner_than_arrivals_of_their_own():
    """Law: a score does not depend on what was scored before; and Var(a - b) < Var(a) + Var(b) over the traces."""
    space, tables, _, arrangement, _ = scored()
    one, other = (
        scorer_for(tables, Sampler(space.problem, None).blocks(tables, 40, purpose), "earliest-free")
        for purpose in (0, 1)
    )
    all_pairs = arrangement.pairs()
    found = {}
    for pairs in (all_pairs, all_pairs[:-1], all_pairs):
        arrangement.restore(pairs)
        for scorer in (one, other):
            scorer.settle(arrangement, None)
            score = scorer.score.copy()
            assert found.setdefault((pairs, scorer), score).tolist() == score.tolist()
    paired = found[all_pairs, one] - found[all_pairs[:-1], one]
    apart = found[all_pairs, one] - found[all_pairs[:-1], other]
    assert paired.mean() > 0
    assert paired.var() < 0.5 * apart.var()


def test_returning_to_a_standing_brings_back_every_score():
    _, _, _, arrangement, scorer = scored()
    scorer.settle(arrangement, None)
    arrangement.forget()
    score, standing = scorer.score.copy(), scorer.standing(arrangement)
    lost, worth = arrangement.now.lost.copy(), arrangement.now.worth.copy()
    scorer.walk(arrangement, 1e9, 20)
    assert scorer.score.tolist() != score.tolist()
    arrangement.operate(Operation.ROLLBACK, 0)
    scorer.resume(arrangement, standing)
    assert scorer.score.tolist() == score.tolist()
    assert arrangement.now.lost.tolist() == lost.tolist()
    assert arrangement.now.worth.tolist() == worth.tolist()


def test_batches_serve_more_than_single_requests_and_about_what_the_event_engine_says():
    _, tables, blocks, arrangement, scorer = scored(batches=(1, 4, 8))
    assert isinstance(scorer, CompiledScorer)
    judge = judge_for(tables, blocks, "earliest-free")
    assert isinstance(judge, SimulatedScorer)
    scorer.settle(arrangement, None)
    judge.settle(arrangement, None)
    assert scorer.score.sum() == pytest.approx(judge.score.sum(), rel=0.1)
    offered = float((scorer.offered * tables.worth.value[0]).sum())
    assert 0.1 * offered < scorer.score.sum() <= offered * (1 + 1e-9)


@pytest.mark.parametrize("objective", ["goodput", "max-min", "fair-sum", "utility"])
def test_walking_without_heat_never_lowers_the_score_under_any_objective(objective):
    _, _, _, arrangement, scorer = scored(objective=objective)
    scorer.settle(arrangement, None)
    scores = [float(scorer.score.sum())]
    for _ in range(6):
        scorer.walk(arrangement, 0.0, 40)
        scores.append(float(scorer.score.sum()))
        arrangement.forget()
    assert scores == sorted(scores)
    assert scores[-1] > scores[0]


def test_impossible_settings_are_refused_all_at_once():
    with pytest.raises(InvalidInput) as refused:
        PolishSettings(time_s=-1, traces=2, candidates=0, routing="luck")
    assert {fault.field for fault in refused.value.faults} == {"time_s", "traces", "candidates", "routing"}


def test_what_may_not_be_polished_comes_back_as_it_was_with_a_warning():
    inputs = toy()
    plan = make_plan(inputs, SETTINGS).plan
    cheapest = Problem(
        cluster=inputs.cluster,
        services=inputs.services,
        profiles=inputs.profiles,
        demand=inputs.demand,
        settings=Settings(minimize="gpus", attainment=0.1),
    )
    same = polished(cheapest, plan, REPEATABLE, None)
    assert same.groups == plan.groups
    assert "not polished: the plan is for fewest gpus" in same.warnings[-1]


@pytest.mark.parametrize("objective", ["max-min", "fair-sum", "utility"])
def test_other_objectives_are_polished_by_what_they_make_of_the_simulation(objective):
    inputs = toy()
    fluid = make_plan(inputs, Settings(time_limit_s=3.0, gap=0.01, objective=objective)).plan
    better = make_plan(inputs, Settings(time_limit_s=3.0, gap=0.01, objective=objective), REPEATABLE).plan
    assert better.polish.attainment > better.polish.start_attainment
    assert better.polish.objective == objective
    if objective == "max-min":
        least = [min(each.attainment for each in plan.predicted) for plan in (fluid, better)]
        assert least[1] > least[0]


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
