"""A placement that compiled moves change in place: what fits, what is kept, and that everything can be undone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from planner import Settings
from planner.arranged import Arrangement, Operation
from planner.space import build_space
from plans.service import Spread
from tests.planner.problems import generated

SHAPES = ((1, 1), (1, 2), (2, 1))


def arrangement_of(given_problem, seed=1):
    space = build_space(given_problem)
    return space, Arrangement(space, range(len(space.options)), seed)


def filled(given_problem, seed=1):
    """An arrangement with groups of every kind that found room, and what they could take."""
    space, arrangement = arrangement_of(given_problem, seed)
    for kind in range(len(arrangement.kinds)):
        arrangement.operate(Operation.OPEN_ALL, kind)
        while arrangement.operate(Operation.ADMIT_WANTING):
            pass
    arrangement.forget()
    return space, arrangement


def picture(arrangement):
    """What stands, in everything that does not depend on the order of changes."""
    now = arrangement.now
    rows = [
        (now.slot[s, : now.replicas[s]].tolist(), now.option[s, : now.replicas[s]].tolist())
        for s in range(len(now.replicas))
    ]
    tenants = [sorted(now.tenant[slot, : now.tenants[slot]].tolist()) for slot in range(len(now.owner))]
    return arrangement.pairs(), rows, now.group_at.tolist(), now.owner.tolist(), tenants, now.option_at.tolist()


def assert_sound(space, arrangement):
    """Memory, budgets and GPUs, counted anew from the pairs; and that the arrays tell what the pairs do."""
    memory, taken, gpus, count = {}, set(), np.zeros(len(space.names)), np.zeros(len(space.names), dtype=int)
    pairs = arrangement.pairs()
    for group, option in pairs:
        assert option in space.groups[group].options
        memory[group] = memory.get(group, 0.0) + space.memory[option]
        gpus[space.service_of[option]] += len(space.groups[group].gpus)
        count[space.service_of[option]] += 1
    assert len({(group, int(space.service_of[option])) for group, option in pairs}) == len(pairs)
    for group in {int(group) for group in arrangement.now.group_at if group >= 0}:
        places = {(space.groups[group].node, gpu) for gpu in space.groups[group].gpus}
        assert not places & taken
        taken |= places
        slot = arrangement.now.slot_of[group]
        assert arrangement.now.used[slot] == pytest.approx(memory.get(group, np.zeros(space.memory.shape[1])))
    assert all((used <= 1 + 1e-6).all() for used in memory.values())
    assert (gpus <= space.max_gpus).all()
    assert arrangement.now.gpus_of == pytest.approx(gpus)
    assert arrangement.now.replicas.tolist() == count.tolist()


@pytest.mark.parametrize("seed", range(7))
def test_rolling_back_returns_to_the_very_same_arrangement_after_any_moves(seed):
    space, arrangement = filled(generated(seed, nodes=2, gpus=4, parallelisms=SHAPES), seed)
    changed = 0
    for step in range(60):
        before = picture(arrangement)
        for _ in range(1 + step % 4):
            arrangement.operate(Operation.LARGE if step % 3 == 0 else Operation.SMALL)
        changed += picture(arrangement) != before
        arrangement.operate(Operation.ROLLBACK, 0)
        assert picture(arrangement) == before
        assert_sound(space, arrangement)
        if arrangement.operate(Operation.SMALL):
            arrangement.forget()
        arrangement.operate(Operation.ROLLBACK, 0)
    assert changed > 5


@pytest.mark.parametrize("seed", range(7))
def test_whatever_moves_make_keeps_memory_budgets_and_gpus_apart(seed):
    space, arrangement = filled(generated(seed, nodes=2, gpus=4, parallelisms=SHAPES), seed)
    seen = set()
    for step in range(150):
        arrangement.operate(Operation.LARGE if step % 7 == 0 else Operation.SMALL)
        arrangement.operate(Operation.COMPLETE)
        arrangement.forget()
        assert_sound(space, arrangement)
        seen.add(arrangement.pairs())
    assert len(seen) > 10


def test_a_small_move_keeps_minimum_replicas():
    space, arrangement = filled(generated(3, services=5, nodes=2, gpus=4, parallelisms=SHAPES))
    arrangement.now.min_replicas[:] = np.minimum(arrangement.now.replicas, 1)
    space = replace(space, min_replicas=arrangement.now.min_replicas.copy())
    moves = 0
    for _ in range(300):
        if arrangement.operate(Operation.SMALL):
            moves += 1
            assert (arrangement.now.replicas >= space.min_replicas).all()
            arrangement.forget()
        arrangement.operate(Operation.ROLLBACK, 0)
    assert moves > 20


def test_a_small_move_keeps_replicas_spread_over_nodes():
    problem = generated(2, services=3, nodes=3, gpus=2, parallelisms=((1, 1),))
    first = problem.services.services[0].model_copy(
        update={"spread": Spread(over="node", max_skew=1, min_domains=2), "max_gpus": None}
    )
    services = problem.services.model_copy(update={"services": (first, *problem.services.services[1:])})
    space, arrangement = arrangement_of(replace(problem, services=services))
    rule = space.requirements.spreads[0]
    mine = [option for option in range(len(space.options)) if space.service_of[option] == rule.service]
    homes = [group for group in range(len(space.groups)) if set(mine) & set(space.groups[group].options)]
    for node in ("node0", "node1", "node2"):
        group = next(group for group in homes if space.groups[group].node == node)
        assert arrangement.operate(Operation.PLACE, group, min(set(mine) & set(space.groups[group].options)))
    arrangement.forget()
    assert arrangement.operate(Operation.KEEPS)
    changed = set()
    for _ in range(400):
        if arrangement.operate(Operation.SMALL):
            domains = np.bincount(
                [rule.domain_of[group] for group, option in arrangement.pairs() if option in mine], minlength=3
            )
            assert domains.max() - domains.min() <= 1
            assert (domains > 0).sum() >= 2
            changed.add(tuple(domains))
            arrangement.forget()
        arrangement.operate(Operation.ROLLBACK, 0)
    assert len(changed) > 1


def test_a_small_move_leaves_no_service_on_one_node_alone_where_a_node_may_be_lost():
    problem = replace(generated(1, nodes=3, gpus=2), settings=Settings(keep_after_loss=0.5))
    space, arrangement = filled(problem)
    options = {option for group in space.groups for option in group.options}
    by_service = {int(space.service_of[option]): option for option in options}
    pairs = []
    for option in by_service.values():
        nodes = {}
        for group in range(len(space.groups)):
            if option in space.groups[group].options:
                nodes.setdefault(space.groups[group].node, group)
        pairs += [(group, option) for group in list(nodes.values())[:2]]
    arrangement.restore(pairs)
    assert arrangement.operate(Operation.KEEPS)
    made, refused = set(), 0
    for _ in range(300):
        before = arrangement.mark
        if not arrangement.operate(Operation.SMALL):
            refused += arrangement.mark > before
        else:
            made.add(arrangement.pairs())
            homes = {}
            for group, option in arrangement.pairs():
                homes.setdefault(int(space.service_of[option]), set()).add(space.groups[group].node)
            assert all(len(each) > 1 for each in homes.values())
            arrangement.forget()
        arrangement.operate(Operation.ROLLBACK, 0)
    assert len(made) > 1
    assert refused


def test_the_same_seed_draws_the_same_moves():
    runs = []
    for seed in (4, 4, 5):
        _, arrangement = filled(generated(1, nodes=2, gpus=4, parallelisms=SHAPES), seed)
        for _ in range(50):
            arrangement.operate(Operation.SMALL)
        runs.append((arrangement.pairs(), arrangement.draw()))
    assert runs[0] == runs[1] != runs[2]


def test_draws_are_spread_evenly_over_the_unit_interval():
    _, arrangement = arrangement_of(generated(1))
    drawn = np.array([arrangement.draw() for _ in range(4000)])
    assert ((drawn >= 0) & (drawn < 1)).all()
    counts, _ = np.histogram(drawn, bins=10, range=(0, 1))
    assert (abs(counts - 400) < 100).all()


def test_pairs_that_do_not_fit_are_left_out():
    space, arrangement = filled(generated(1, nodes=2, gpus=4, parallelisms=SHAPES))
    stood = arrangement.pairs()
    everything = [(group, option) for group in range(len(space.groups)) for option in space.groups[group].options]
    arrangement.restore((*stood, *everything))
    assert set(stood) <= set(arrangement.pairs())
    assert_sound(space, arrangement)
    arrangement.restore(stood)
    assert arrangement.pairs() == stood
