from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given

from plans import diff, transition
from tests.plans.strategies import MEMORY_BYTES, cluster, entry, group, plan, plans


def replicas(one):
    return {(g.id, e.service): (g, e) for g in one.groups for e in g.loadout}


@given(plans(), plans())
def test_no_step_exceeds_the_memory_of_a_gpu(before, after):
    """Law: walking the steps, the sum of what is loaded never passes a GPU's memory."""
    used = defaultdict(int)

    def add(owner, sign):
        g, e = owner
        for gpu, size in zip(g.gpus, e.memory_bytes, strict=True):
            used[g.node, gpu] += sign * size

    for owner in replicas(before).values():
        add(owner, 1)
    for step in transition(before, after, cluster()).steps:
        if step.action == "load":
            add(replicas(after)[step.group, step.service], 1)
            assert max(used.values()) <= MEMORY_BYTES
        elif step.action == "unload":
            add(replicas(before)[step.group, step.service], -1)


@given(plans(), plans())
def test_every_reload_is_loaded_once_and_every_leaver_unloaded_once(before, after):
    steps = transition(before, after, cluster()).steps
    loads = sorted((s.group, s.service) for s in steps if s.action == "load")
    unloads = sorted((s.group, s.service) for s in steps if s.action == "unload")
    changes = diff(before, after).entries
    assert loads == sorted((c.group, c.service) for c in changes if c.reloads)
    gone = [c for c in changes if c.before is not None and (c.after is None or c.reloads)]
    assert unloads == sorted((c.group, c.service) for c in gone)
    assert [s.step for s in steps] == list(range(1, len(steps) + 1))


@given(plans(), plans())
def test_drain_comes_before_unload_and_after_the_routes_flipped(before, after):
    steps = transition(before, after, cluster()).steps
    for position, step in enumerate(steps):
        if step.action == "unload":
            previous = steps[position - 1]
            assert (previous.action, previous.group, previous.service) == ("drain", step.group, step.service)


@given(plans(), plans())
def test_the_stated_fall_of_capacity_is_what_replaying_the_steps_shows(before, after):
    """Law: over the steps a service plans less than in both plans exactly where a fall says so, and as little."""
    change = transition(before, after, cluster())
    old, new = replicas(before), replicas(after)
    reloaded = {(c.group, c.service) for c in diff(before, after).entries if c.reloads}
    loaded = {owner for owner in new if owner not in reloaded}
    serving, lowest = old, {}

    def note():
        for service in {name for _, name in (*old, *new)}:
            rate = sum(e.rate_rps for (_, name), (_, e) in serving.items() if name == service)
            lowest[service] = min(lowest.get(service, rate), rate)

    note()
    for step in change.steps:
        if step.action == "load":
            loaded.add((step.group, step.service))
        elif step.action in ("route", "drain"):
            serving = {owner: entry_ for owner, entry_ in new.items() if owner in loaded}
            note()
    falls = {fall.service: fall for fall in change.falls}
    for service, least in lowest.items():
        rates = [sum(e.rate_rps for (_, name), (_, e) in each.items() if name == service) for each in (old, new)]
        if least < min(rates) * (1 - 1e-9):
            assert falls.pop(service).lowest_rps == pytest.approx(least, abs=1e-9)
    assert not falls
    assert all(fall.for_s > 0 for fall in change.falls)


def test_late_loads_of_different_nodes_run_beside_each_other():
    small = [group(f"node-{n}", (0,), [entry("detect", variant="small", memory_bytes=(500,))]) for n in range(2)]
    large = [
        group(f"node-{n}", (0,), [entry("detect", variant="large", memory_bytes=(600,), load_s=2.0)]) for n in range(2)
    ]
    (fall,) = transition(plan(small), plan(large), cluster()).falls
    assert (fall.before_rps, fall.lowest_rps, fall.after_rps, fall.for_s) == (2.0, 0.0, 2.0, 3.0)


@given(plans())
def test_a_plan_that_runs_already_needs_no_step(one):
    assert transition(one, one, cluster()).steps == ()


def test_what_fits_is_made_before_the_old_one_is_broken():
    before = plan([group("node-0", (0,), [entry("detect", variant="small", memory_bytes=(400,))])])
    after = plan([group("node-0", (0,), [entry("detect", variant="large", memory_bytes=(600,))])])
    actions = [step.action for step in transition(before, after, cluster()).steps]
    assert actions == ["load", "drain", "unload"]


def test_what_does_not_fit_waits_and_a_warning_says_how_long():
    before = plan([group("node-0", (0,), [entry("detect", variant="small", memory_bytes=(500,))])])
    after = plan([group("node-0", (0,), [entry("detect", variant="large", memory_bytes=(600,), load_s=2.0)])])
    result = transition(before, after, cluster())
    assert [step.action for step in result.steps] == ["drain", "unload", "load", "route"]
    assert "detect: 100%" in result.warnings[0]
    assert "3 s" in result.warnings[0]
    assert "falls from 1 to 0 rps" in result.warnings[0]
