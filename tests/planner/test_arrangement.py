"""A placement that is changed in place: what fits, and that everything can be undone."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.arrangement import Arrangement
from planner.space import build_space
from tests.planner.problems import cluster, demand, generated, latency_service, problem, profile


def arrangement_of(given_problem):
    space = build_space(given_problem)
    return Arrangement(space, range(len(space.options)))


def picture(arrangement):
    hosts = arrangement.deployment
    rows = [
        (hosts.slot[s, : hosts.count[s]].tolist(), hosts.option[s, : hosts.count[s]].tolist())
        for s in range(len(hosts.count))
    ]
    return arrangement.pairs(), rows, arrangement.group_at.tolist()


def wander(arrangement, generator, steps):
    """Open, close, add and remove at random, only what is allowed."""
    space = arrangement.space
    for _ in range(steps):
        draw = generator.random()
        slots = list(arrangement.loadouts)
        if draw < 0.3:
            group = generator.randrange(len(space.groups))
            if not arrangement.overlapping(group):
                arrangement.open(group)
        elif draw < 0.4 and slots:
            arrangement.close(generator.choice(slots))
        elif draw < 0.8 and slots:
            slot = generator.choice(slots)
            option = generator.choice(space.groups[arrangement.group_at[slot]].options)
            if space.service_of[option] not in arrangement.loadouts[slot] and arrangement.fits(slot, option):
                arrangement.add(slot, option)
        elif slots:
            slot = generator.choice(slots)
            if arrangement.loadouts[slot]:
                arrangement.remove(slot, generator.choice(list(arrangement.loadouts[slot])))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_rolling_back_returns_to_the_very_same_arrangement(seed):
    generator = random.Random(seed)
    arrangement = arrangement_of(generated(seed % 7, nodes=2, gpus=4, parallelisms=((1, 1), (1, 2), (2, 1))))
    wander(arrangement, generator, 30)
    mark, before = arrangement.mark(), picture(arrangement)
    wander(arrangement, generator, 40)
    arrangement.rollback(mark)
    assert picture(arrangement) == before


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_whatever_stands_keeps_memory_budgets_and_gpus_apart(seed):
    arrangement = arrangement_of(generated(seed % 7, nodes=2, gpus=4, parallelisms=((1, 1), (1, 2), (2, 1))))
    wander(arrangement, random.Random(seed), 80)
    space = arrangement.space
    memory, taken, gpus = {}, set(), np.zeros(len(space.names))
    for group, option in arrangement.pairs():
        memory[group] = memory.get(group, 0.0) + space.memory[option]
        gpus[space.service_of[option]] += len(space.groups[group].gpus)
    for group in {int(group) for group in arrangement.group_at if group >= 0}:
        places = {(space.groups[group].node, gpu) for gpu in space.groups[group].gpus}
        assert not places & taken
        taken |= places
    assert all((used <= 1 + 1e-6).all() for used in memory.values())
    assert (gpus <= space.max_gpus).all()


def test_deployments_are_sorted_by_slot_within_a_service():
    arrangement = arrangement_of(
        problem(cluster(("n", "gpu", 4)), [latency_service("a", ("m", 1.0))], [profile("m")], demand(a=1.0))
    )
    space = arrangement.space
    for group in (2, 0, 3):
        slot = arrangement.open(group)
        arrangement.add(slot, space.groups[group].options[0])
    assert arrangement.deployment.slot[0, :3].tolist() == [0, 2, 3]
    arrangement.remove(2, 0)
    assert arrangement.deployment.slot[0, :2].tolist() == [0, 3]


def test_restoring_leaves_out_what_does_not_fit():
    arrangement = arrangement_of(
        problem(
            cluster(("n", "gpu", 1), memory_gib=5),
            [latency_service("a", ("m", 1.0)), latency_service("b", ("k", 1.0))],
            [profile("m", weights_gib=3), profile("k", weights_gib=3)],
            demand(a=1.0, b=1.0),
        )
    )
    options = [
        min(option for option in arrangement.space.groups[0].options if arrangement.space.service_of[option] == service)
        for service in (0, 1)
    ]
    arrangement.restore([(0, option) for option in options])
    assert arrangement.pairs() == ((0, options[0]),)
