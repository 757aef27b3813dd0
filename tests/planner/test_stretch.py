from __future__ import annotations

import numpy as np

from planner.space import Placed, build_space
from planner.stretch import stretch_batches
from tests.planner.problems import town


def smallest_of(space, group, service):
    """Return the option of a service on a group with the smallest batch."""
    mine = [o for o in space.groups[group].options if space.options[o].service == service]
    return min(mine, key=lambda option: (space.options[option].batch, option))


def everywhere_alone(space):
    """Place one service alone on each of the first groups, at its smallest batch and half its compute."""
    groups = [g for g, group in enumerate(space.groups) if group.options]
    names = [space.options[space.groups[g].options[0]].service for g in groups]
    return tuple(Placed(g, smallest_of(space, g, name), 0.5) for g, name in zip(groups, names, strict=True))


def test_rates_stay_and_batches_only_grow():
    space = build_space(town())
    before = everywhere_alone(space)
    after = stretch_batches(space, before)
    np.testing.assert_allclose(space.served_rps(after), space.served_rps(before))
    for old, new in zip(sorted(before), after, strict=True):
        assert (old.group, space.options[old.option].variant) == (new.group, space.options[new.option].variant)
        assert space.options[new.option].batch >= space.options[old.option].batch
        assert new.share <= old.share + 1e-12
    assert any(
        space.options[n.option].batch > space.options[o.option].batch for o, n in zip(before, after, strict=True)
    )


def test_stretching_twice_changes_nothing():
    space = build_space(town())
    once = stretch_batches(space, everywhere_alone(space))
    assert stretch_batches(space, once) == once


def test_neighbours_keep_their_memory_and_their_deadlines():
    space = build_space(town())
    for g, group in enumerate(space.groups):
        services = sorted({space.options[o].service for o in group.options})
        pairs = [(smallest_of(space, g, a), smallest_of(space, g, b)) for a in services for b in services if a < b]
        for pair in pairs:
            if not space.conflicts(pair[:1], pair[1:]).any() and (space.memory[list(pair)].sum(axis=0) <= 1).all():
                after = [p.option for p in stretch_batches(space, tuple(Placed(g, o, 0.1) for o in pair))]
                assert not space.conflicts(after[:1], after[1:]).any()
                assert (space.memory[after].sum(axis=0) <= 1 + 1e-9).all()
