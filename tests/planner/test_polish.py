"""The search by simulation: never worse, repeatable, and within everything that the planner holds hard."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linprog

from planner import PolishLimits, Refused, Settings, polish_plan, solve
from planner.correction import corrected, replanned
from planner.greedy import greedy
from planner.polish import polish
from planner.simulated_scorer import SimulatedScorer
from planner.space import build_space
from planner.worth import worth_of
from tests.planner.problems import QUIET, cluster, demand, generated, latency_service, problem, profile, town


class PlainSimulator:
    """Admission at arrival on the group whose work ends first, in plain Python, on a few bursts of requests."""

    def __init__(self, space, seed, blocks=4, requests=60):
        generator = np.random.default_rng(seed)
        self._hold_s = [option.hold_s / option.batch for option in space.options]
        services = len(space.names)
        rate = space.offered_rps / max(space.offered_rps.sum(), 1e-9)
        span_s = requests / max(space.offered_rps.sum(), 1e-9)
        self.blocks = []
        for _ in range(blocks):
            service = generator.choice(services, requests, p=rate)
            self.blocks.append((np.sort(generator.random(requests)) * span_s * generator.uniform(0.2, 1.0), service))
        self._deadline_s = [min((o.deadline_s for o in space.catalogue.of(name)), default=0.0) for name in space.names]

    def good(self, arrangement, block):
        now, (arrival_s, service) = arrangement.now, self.blocks[block]
        good, free_s = np.zeros(now.slot.shape, dtype=np.int64), {}
        for at, s in zip(arrival_s.tolist(), service.tolist(), strict=True):
            hosts = range(now.replicas[s])
            if not hosts:
                continue
            host = min(hosts, key=lambda h: (free_s.get(int(now.slot[s, h]), 0.0), h))
            slot, option = int(now.slot[s, host]), int(now.option[s, host])
            end = max(at, free_s.get(slot, 0.0)) + self._hold_s[option]
            if end <= at + self._deadline_s[s]:
                free_s[slot] = end
                good[s, host] += 1
        return good


def scorer(space, seed, worth=None):
    plain = PlainSimulator(space, seed)
    offered = np.array([np.bincount(service, minlength=len(space.names)) for _, service in plain.blocks])
    seconds = sum(float(arrival_s[-1]) for arrival_s, _ in plain.blocks)
    return SimulatedScorer("plain loop", worth or worth_of(space), offered, seconds, plain.good)


def frozen_clock():
    return 0.0


def search(space, start, *, moves=150, seed=1, others=(), allowed=lambda pairs: True):
    return polish(
        space,
        start,
        scorer(space, seed=5),
        scorer(space, seed=6),
        worth_of(space),
        tuple(range(len(space.options))),
        PolishLimits(time_s=1.0, moves=moves, seed=seed),
        frozen_clock,
        others=others,
        allowed=allowed,
    )


def pairs_of(placement):
    return tuple(sorted((placed.group, placed.option) for placed in placement))


def shared(seed):
    return generated(seed, services=4, nodes=2, gpus=4, load=30.0, parallelisms=((1, 1), (1, 2), (1, 4), (2, 1)))


def judged(space, pairs):
    """The judge's score of ``pairs``, from a polish that has no candidates to try."""
    return search(space, pairs, moves=1).start_score


@pytest.mark.parametrize("seed", range(6))
def test_the_result_is_never_worse_than_the_start_in_the_eyes_of_the_judge(seed):
    space = build_space(shared(seed))
    start = pairs_of(greedy(space) or ())
    found = search(space, start)
    assert found.score >= found.start_score
    assert judged(space, found.pairs) == found.score
    assert judged(space, start) == found.start_score


@pytest.mark.parametrize("seed", range(6))
def test_everything_that_the_planner_holds_hard_is_kept(seed):
    space = build_space(shared(seed))
    found = search(space, pairs_of(greedy(space) or ()))
    used, gpus = {}, set()
    count, held = np.zeros(len(space.names), dtype=int), np.zeros(len(space.names))
    for group, option in found.pairs:
        assert option in space.groups[group].options
        used[group] = used.get(group, 0.0) + space.memory[option]
        count[space.service_of[option]] += 1
        held[space.service_of[option]] += len(space.groups[group].gpus)
    assert all((share <= 1 + 1e-6).all() for share in used.values())
    assert (count >= space.min_replicas).all()
    assert (held <= space.max_gpus).all()
    for group in used:
        places = {(space.groups[group].node, gpu) for gpu in space.groups[group].gpus}
        assert not places & gpus
        gpus |= places
    for one, two in itertools.combinations(found.pairs, 2):
        assert one[0] != two[0] or space.service_of[one[1]] != space.service_of[two[1]]


def test_the_same_seed_and_limit_give_the_same_placement():
    space = build_space(shared(5))
    start = pairs_of(greedy(space) or ())
    first, again = search(space, start), search(space, start)
    assert first == again
    assert first.start_score < first.score < 1
    assert first.candidates > 50


def test_the_search_ends_soon_after_its_limit():
    space = build_space(shared(2))
    assert search(space, pairs_of(greedy(space) or ()), moves=20).candidates < 20 + 64 + 61 + 40


def test_an_empty_start_is_filled():
    space = build_space(
        problem(cluster(("n", "gpu", 2)), [latency_service("a", ("m", 1.0))], [profile("m")], demand(a=20.0))
    )
    found = search(space, ())
    assert found.start_score == 0
    assert found.score > 0


def test_a_problem_without_anything_to_change_comes_to_an_end():
    """One GPU, one service, one option: every draw leads nowhere, and the clock stands still."""
    inventory = cluster(("n", "gpu", 1), memory_gib=4)
    only = [latency_service("a", ("m", 1.0), min_replicas=1)], [profile("m", weights_gib=3, batches=(1,))]
    space = build_space(problem(inventory, *only, demand(a=300.0)))
    start = pairs_of(greedy(space))
    assert search(space, start).pairs == start


def test_services_that_fit_nowhere_leave_the_start_as_it_is():
    inventory = cluster(("n", "gpu", 1), memory_gib=1)
    space = build_space(
        problem(inventory, [latency_service("a", ("m", 1.0))], [profile("m", weights_gib=3)], demand(a=3.0))
    )
    found = search(space, ())
    assert (found.pairs, found.score) == ((), 0.0)


def test_weights_decide_who_is_served_where_not_all_can_be():
    space = build_space(
        problem(
            cluster(("n", "gpu", 1), memory_gib=4),
            [latency_service("light", ("m", 1.0)), latency_service("heavy", ("k", 1.0), weight=5.0)],
            [profile("m", weights_gib=3, batches=(1,)), profile("k", weights_gib=3, batches=(1,))],
            demand(light=30.0, heavy=30.0),
        )
    )
    found = search(space, (), moves=200)
    assert {space.options[option].service for _, option in found.pairs} == {"heavy"}


def test_utilisations_are_corrected_to_what_groups_bore():
    """The mean over groups of a shape; within what the settings allow; the catalogue stays the same otherwise."""
    space = build_space(shared(1))
    start = pairs_of(greedy(space) or ())
    better = corrected(space, start, scorer(space, seed=5))
    limits = space.problem.settings
    assert better.sustained_rps.shape == space.sustained_rps.shape
    assert any(one.utilisation != two.utilisation for one, two in zip(space.options, better.options, strict=True))
    for before, after in zip(space.options, better.options, strict=True):
        assert limits.min_utilisation <= after.utilisation <= limits.max_utilisation
        assert replace(after, utilisation=before.utilisation) == before
    assert better.sustained_rps == pytest.approx([option.sustained_rps for option in better.options])
    again = replanned(better, frozen_clock, 1.0)
    assert again
    assert search(space, again).score >= judged(space, again)


def test_other_starts_are_tried_and_never_make_it_worse():
    space = build_space(shared(1))
    good = search(space, pairs_of(greedy(space) or ()), moves=400)
    found = search(space, pairs_of(greedy(space) or ()), moves=2, others=(good.pairs,))
    assert found.score >= found.start_score


def scorers_of(space):
    return lambda tables: (scorer(space, seed=5), scorer(space, seed=6))


def test_a_polished_plan_keeps_the_certificate_and_routes_to_every_replica():
    given_problem = shared(1)
    solved = solve(given_problem)
    space = build_space(given_problem)
    found = polish_plan(
        given_problem, solved.plan, scorers_of(space), PolishLimits(time_s=1.0, moves=200), clock=frozen_clock
    )
    assert found.outcome.score >= found.outcome.start_score
    assert found.plan.solver == solved.plan.solver
    for group in found.plan.groups:
        busy = sum(entry.rate_rps / entry.max_batch * max(entry.stage_latency_s[-1]) for entry in group.loadout)
        assert busy <= 1 + 1e-6
        for entry in group.loadout:
            assert any(route.group == group.id for route in found.plan.routes[entry.service])


def test_a_placement_that_is_not_allowed_is_never_the_answer():
    space = build_space(shared(1))
    start = pairs_of(greedy(space) or ())
    free = search(space, start, moves=400)
    assert free.pairs != start
    held = search(space, start, moves=400, allowed=lambda pairs: pairs != free.pairs)
    assert held.start_score <= held.score <= free.score
    assert held.pairs != free.pairs
    assert search(space, start, moves=400, allowed=lambda pairs: False).pairs == start


@pytest.mark.parametrize("seed", [2, 4])
def test_a_polished_plan_is_another_one_and_keeps_its_share_after_the_loss_of_any_node(seed):
    """Every service, by a linear program of this test: each lost node leaves a routing that serves 0.6 of its rate."""
    given_problem = replace(
        generated(seed, services=4, nodes=3, gpus=2, load=30.0, parallelisms=((1, 1), (1, 2), (2, 1))),
        settings=Settings(keep_after_loss=0.6, time_limit_s=5.0),
    )
    solved = solve(given_problem)
    space = build_space(given_problem)
    found = polish_plan(
        given_problem, solved.plan, scorers_of(space), PolishLimits(time_s=1.0, moves=300), clock=frozen_clock
    )
    assert found.outcome.score > found.outcome.start_score + 0.1
    assert found.plan.placement_digest != solved.plan.placement_digest
    assert {each.name for each in found.plan.contingencies} == {node.name for node in given_problem.cluster.nodes}
    replicas = [
        (group.id, entry.service, entry.rate_rps, group.node) for group in found.plan.groups for entry in group.loadout
    ]
    sustained = {
        (group.id, entry.service): space.sustained_rps[option]
        for group in found.plan.groups
        for entry in group.loadout
        for option, known in enumerate(space.options)
        if known.key[0] == entry.service
        and known.key[1] == entry.variant
        and known.key[3:] == (group.tp, group.pp, entry.max_batch)
    }
    for lost in given_problem.cluster.nodes:
        alive = [(group, service) for group, service, _, node in replicas if node != lost.name]
        rows, limits = [], []
        for group in {group for group, _ in alive}:
            rows.append([float(each[0] == group) for each in alive])
            limits.append(1.0)
        for name in space.names:
            kept = 0.6 * sum(rate for _, service, rate, _ in replicas if service == name)
            rows.append([-sustained[each] if each[1] == name else 0.0 for each in alive])
            limits.append(-kept * (1 - 1e-5))
        assert linprog(np.zeros(len(alive)), A_ub=np.array(rows), b_ub=limits, bounds=(0, 1)).success


class TickingClock:
    """A clock that only the requests of a simulation move."""

    def __init__(self, request_s):
        self.requests = 0
        self._request_s = request_s

    def __call__(self):
        return self.requests * self._request_s

    def ticks_with(self, given):
        simulate = given._simulate

        def counted(arrangement, block):
            self.requests += int(given.offered[block].sum())
            return simulate(arrangement, block)

        given._simulate = counted
        return given


def search_by(clock, space, limits):
    search, judge = (clock.ticks_with(scorer(space, seed=seed)) for seed in (5, 6))
    start, options = pairs_of(greedy(space) or ()), tuple(range(len(space.options)))
    return polish(space, start, search, judge, worth_of(space), options, limits, clock)


@pytest.mark.parametrize("time_s", [2.0, 6.0, 30.0])
def test_a_search_ends_in_time_however_slow_its_simulation_is(time_s, monkeypatch):
    """Two walks end late by their work each, with five simulations of 0.24 s; time for three of these is held back."""
    monkeypatch.setattr("planner.simulated_scorer._WORK", 500)
    clock = TickingClock(1e-3)
    found = search_by(clock, build_space(shared(3)), PolishLimits(time_s=time_s))
    assert 0.5 * time_s < clock() < time_s + 2 * (0.5 + 0.24) + (5 - 3) * 0.24
    assert found.score >= found.start_score


def test_a_limit_of_moves_that_strikes_first_decides_alone():
    """Law: with it, the same plan comes out whether no time passes or nearly all that there is."""
    space, limits = build_space(shared(5)), PolishLimits(time_s=1e3, moves=150)
    frozen = TickingClock(0.0)
    found = search_by(frozen, space, limits)
    ticking = TickingClock(0.9 * limits.time_s / frozen.requests)
    assert search_by(ticking, space, limits) == found
    assert ticking() == pytest.approx(0.9 * limits.time_s)
    assert found.moves >= 150


@pytest.mark.parametrize(
    ("given_problem", "reason"),
    [
        (town(), "chat"),
        (replace(generated(1), settings=Settings(minimize="cost", attainment=0.1)), "fewest cost"),
        (replace(generated(1), settings=Settings(attainment=0.1)), "required attainment"),
        (replace(generated(1), settings=Settings(scenarios=3)), "scenarios"),
    ],
)
def test_what_the_search_would_not_keep_is_refused_with_the_reason(given_problem, reason):
    space = build_space(given_problem)
    solved = solve(replace(given_problem, settings=QUIET))
    found = polish_plan(given_problem, solved.plan, scorers_of(space), PolishLimits(time_s=1.0), clock=frozen_clock)
    assert isinstance(found, Refused)
    assert reason in found.reason
