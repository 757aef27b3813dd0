from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans import diff, transition
from plans.transition import waves_of
from tests.plans.strategies import MEMORY_BYTES, SERVICES, cluster, entry, group, plan, plans


def replicas(one):
    return {(g.id, e.service): (g, e) for g in one.groups for e in g.loadout}


@st.composite
def tight_plans(draw):
    """Draw a plan that leaves little memory: most changes have to wait for something that leaves."""
    groups = []
    for node in ("node-0", "node-1"):
        for tile in draw(st.sampled_from([[(0,), (1,), (2,)], [(0, 1), (2,)], [(0,), (1, 2)]])):
            services = draw(st.lists(st.sampled_from(SERVICES), unique=True, min_size=1, max_size=2))
            entries = [
                entry(
                    service,
                    len(tile),
                    variant=draw(st.sampled_from(["small", "large"])),
                    rate_rps=float(draw(st.integers(1, 9))),
                    memory_bytes=(draw(st.integers(300, MEMORY_BYTES // len(services))),) * len(tile),
                    load_s=float(draw(st.integers(1, 3))),
                    stage_latency_s=((0.05,), (0.1,)),
                )
                for service in services
            ]
            groups.append(group(node, tile, entries))
    return plan(groups)


def shared_rates(serving):
    """Return the rate per service of (group, entry, most_busy) replicas, slowed alike where a GPU is overfull."""
    busy = defaultdict(float)
    for g, e, _ in serving:
        for gpu in g.gpus:
            busy[g.node, gpu] += e.rate_rps * max(e.stage_latency_s[-1]) / e.max_batch
    rates = defaultdict(float)
    for g, e, most in serving:
        rates[e.service] += e.rate_rps / max(1.0, max(busy[g.node, gpu] / most[g.node, gpu] for gpu in g.gpus))
    return rates


def most_busy(before, after):
    most = defaultdict(lambda: 1.0)
    for one in (before, after):
        for g in one.groups:
            busy = sum(e.rate_rps * max(e.stage_latency_s[-1]) / e.max_batch for e in g.loadout)
            for gpu in g.gpus:
                most[g.node, gpu] = max(most[g.node, gpu], busy)
    return most


def replay(before, after, steps):
    """Walk the steps; return (seconds, rate per service) from each flip of the routes to the next."""
    most = most_busy(before, after)
    reloaded = {(c.group, c.service) for c in diff(before, after).entries if c.reloads}
    stays = [(g, e, most) for key, (g, e) in replicas(after).items() if key not in reloaded]
    old = {key: (g, e, most) for key, (g, e) in replicas(before).items()}
    gone = {(c.group, c.service) for c in diff(before, after).entries if c.before and (c.after is None or c.reloads)}
    old = {key: one for key, one in old.items() if key in gone}
    loaded, spans, begun = [], [], bool(steps) and steps[0].action == "drain"
    drains, loads, fresh = [], defaultdict(float), []
    for step, following in [*pairwise(steps), (steps[-1], None)] if steps else []:
        key = (step.group, step.service)
        if step.action == "load":
            g, e = replicas(after)[key]
            fresh.append((g, e, most))
            loads[g.node] += e.load_s
        elif step.action == "drain":
            drains.append(old.pop(key)[1].deadline_s)
        ends = following is None or (
            (step.action, following.action) in (("load", "drain"), ("route", "drain"), ("route", "load"))
        )
        if ends and begun:
            spans.append(
                (
                    max(drains, default=0) + max(loads.values(), default=0),
                    shared_rates([*stays, *loaded, *old.values()]),
                )
            )
        if ends:
            begun, loaded, fresh, drains, loads = True, [*loaded, *fresh], [], [], defaultdict(float)
    return spans


def totals(one):
    return shared_rates([(g, e, most_busy(one, one)) for g, e in replicas(one).values()])


def lowest_shares(before, after, spans):
    base = {name: min(rate, totals(after)[name]) for name, rate in totals(before).items() if totals(after)[name] > 0}
    return sorted(min([1.0, *(rates[name] / rate for _, rates in spans)]) for name, rate in base.items())


class Walk:
    """The bytes on each GPU along the steps."""

    def __init__(self, before, after):
        self.before, self.after, self.used = before, after, defaultdict(int)
        self.stays = {
            (c.group, c.service) for c in diff(before, after).entries if c.before and c.after and not c.reloads
        }
        self.flipped = False
        for key in replicas(before):
            self.add(before, key, 1)

    def add(self, one, key, sign):
        g, e = replicas(one)[key]
        for gpu, size in zip(g.gpus, e.memory_bytes, strict=True):
            self.used[g.node, gpu] += sign * size

    def take(self, step):
        if step.action != "load" and not self.flipped:  # what stays and becomes smaller gives up the rest
            self.flipped = True
            self.resize(self.before, self.after, -1)
        if step.action == "load":
            self.add(self.after, (step.group, step.service), 1)
        elif step.action == "unload":
            self.add(self.before, (step.group, step.service), -1)

    def resize(self, larger, smaller, sign):
        for key in self.stays:
            g, one = replicas(larger)[key]
            _, other = replicas(smaller)[key]
            for gpu, has, needs in zip(g.gpus, one.memory_bytes, other.memory_bytes, strict=True):
                self.used[g.node, gpu] += sign * max(0, has - needs)


@given(st.one_of(st.tuples(plans(), plans()), st.tuples(tight_plans(), tight_plans())))
def test_no_step_exceeds_the_memory_of_a_gpu(pair):
    """Law: walking the steps, the sum of what is loaded never passes a GPU's memory, and the target's is left."""
    before, after = pair
    walk = Walk(before, after)
    for step in transition(before, after, cluster()).steps:
        walk.take(step)
        assert step.action != "load" or max(walk.used.values()) <= MEMORY_BYTES
    if walk.flipped:
        walk.resize(after, before, 1)
        wanted = defaultdict(int)
        for g, e in replicas(after).values():
            for gpu, size in zip(g.gpus, e.memory_bytes, strict=True):
                wanted[g.node, gpu] += size
        assert {gpu: size for gpu, size in walk.used.items() if size} == wanted


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


@given(st.one_of(st.tuples(plans(), plans()), st.tuples(tight_plans(), tight_plans())))
def test_the_stated_fall_of_capacity_is_what_replaying_the_steps_shows(pair):
    """Law: over the steps a service plans less than in both plans exactly where a fall says so, as little, as long."""
    before, after = pair
    change = transition(before, after, cluster())
    spans = replay(before, after, change.steps)
    falls = {fall.service: fall for fall in change.falls}
    for service, rate in totals(before).items():
        base = min(rate, totals(after)[service])
        fallen = [(rates[service], for_s) for for_s, rates in spans if rates[service] < base * (1 - 1e-9)]
        if fallen:
            fall = falls.pop(service)
            assert fall.lowest_rps == pytest.approx(min(rate for rate, _ in fallen), abs=1e-9)
            assert fall.for_s == pytest.approx(sum(for_s for _, for_s in fallen))
            assert (fall.before_rps, fall.after_rps) == (totals(before)[service], totals(after)[service])
            assert any(warning.startswith(f"{service}: ") for warning in change.warnings)
    assert not falls


@given(tight_plans(), tight_plans())
def test_services_never_fall_further_than_with_everything_in_one_wave(before, after):
    """Law: the least shares that services keep, ascending, are at least those of: what fits, all leaves, the rest."""
    most, used = most_busy(before, after), defaultdict(int)
    reloaded = {(c.group, c.service) for c in diff(before, after).entries if c.reloads}
    for g, e in replicas(before).values():
        for gpu, size in zip(g.gpus, e.memory_bytes, strict=True):
            used[g.node, gpu] += size
    serving = [(g, e, most) for key, (g, e) in replicas(after).items() if key not in reloaded]
    loads = sorted(reloaded, key=lambda key: (-sum(replicas(after)[key][1].memory_bytes), key))
    for g, e in (replicas(after)[key] for key in loads):
        if all(used[g.node, gpu] + size <= MEMORY_BYTES for gpu, size in zip(g.gpus, e.memory_bytes, strict=True)):
            serving.append((g, e, most))
            for gpu, size in zip(g.gpus, e.memory_bytes, strict=True):
                used[g.node, gpu] += size
    one_wave = lowest_shares(before, after, [(1.0, shared_rates(serving))])
    found = lowest_shares(before, after, replay(before, after, transition(before, after, cluster()).steps))
    assert [round(share, 6) for share in found] >= [round(share, 6) for share in one_wave]


@given(tight_plans(), tight_plans())
def test_waves_are_read_back_from_the_steps(before, after):
    """Law: every wave but the first has something, each step is in one wave, and the order is that of the steps."""
    steps = transition(before, after, cluster()).steps
    first, *rest = waves_of(steps)
    assert not first.drains
    assert all(wave.drains or wave.loads for wave in rest)
    assert [step for wave in (first, *rest) for step in (*wave.drains, *wave.loads)] == [
        step for step in steps if step.action in ("drain", "load")
    ]


def test_replicas_of_one_service_are_replaced_in_turn_where_nothing_fits_beside_them():
    small = [group(f"node-{n}", (0,), [entry("detect", variant="small", memory_bytes=(500,))]) for n in range(2)]
    large = [
        group(f"node-{n}", (0,), [entry("detect", variant="large", memory_bytes=(600,), load_s=2.0)]) for n in range(2)
    ]
    change = transition(plan(small), plan(large), cluster())
    assert [step.action for step in change.steps] == ["drain", "unload", "load", "route"] * 2
    (fall,) = change.falls
    assert (fall.before_rps, fall.lowest_rps, fall.after_rps, fall.for_s) == (2.0, 1.0, 2.0, 6.0)


def test_services_that_must_fall_anyway_fall_at_the_same_time():
    before, after = (
        [group("node-0", (n,), [entry(f"s{n}", variant=variant, memory_bytes=(600,), load_s=2.0)]) for n in range(3)]
        for variant in ("small", "large")
    )
    change = transition(plan(before), plan(after), cluster())
    assert len(waves_of(change.steps)) == 2
    assert [(fall.service, fall.lowest_rps, fall.for_s) for fall in change.falls] == [
        ("s0", 0.0, 7.0),
        ("s1", 0.0, 7.0),
        ("s2", 0.0, 7.0),
    ]


def test_only_one_of_services_that_change_places_in_a_ring_falls():
    names = ("detect", "segment", "classify")
    before = [group("node-0", (n,), [entry(name, memory_bytes=(700,))]) for n, name in enumerate(names)]
    after = [group("node-0", ((n + 1) % 3,), [entry(name, memory_bytes=(700,))]) for n, name in enumerate(names)]
    change = transition(plan(before), plan(after), cluster())
    assert len(change.falls) == 1
    assert len(waves_of(change.steps)) == 4


def test_spare_memory_anywhere_lets_all_move_without_a_fall():
    """Three services change places in a ring, a second replica of one fits elsewhere first: nothing falls."""
    names = ("detect", "segment", "classify")
    before = [group("node-0", (n,), [entry(name, memory_bytes=(700,))]) for n, name in enumerate(names)]
    after = [group("node-0", ((n + 1) % 3,), [entry(name, memory_bytes=(700,))]) for n, name in enumerate(names)]
    after.append(group("node-1", (0,), [entry("segment", memory_bytes=(700,))]))
    change = transition(plan(before), plan(after), cluster())
    assert change.falls == ()
    assert len(waves_of(change.steps)) == 4


def test_many_replicas_take_few_waves():
    before, after = (
        [
            group(f"node-{n}", (g,), [entry("detect", variant=v, memory_bytes=(600,))])
            for n in range(10)
            for g in range(4)
        ]
        for v in ("small", "large")
    )
    change = transition(plan(before), plan(after), cluster(nodes=10))
    assert len(waves_of(change.steps)) == 9
    (fall,) = change.falls
    assert fall.lowest_rps == 35.0


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
    assert "falls from 1 to 0 rps for about 3 s" in result.warnings[0]
