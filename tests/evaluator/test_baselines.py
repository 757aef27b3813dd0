"""The simple policies keep every limit that the planner keeps, and do what their names say."""

import dataclasses

import pytest

from evaluator.baselines import LeastLoaded, RandomPlacement, RoundRobin, SelectiveReplication
from evaluator.draft import HEADROOM_RATIO, Draft
from evaluator.policy import Situation
from plans.errors import InvalidInput
from plans.service import GenerationService, GenerationSlo, Services, Variant
from profiles.generation import token_rules
from profiles.library import ProfileLibrary
from tests.planner.problems import cluster, demand, phased, profile
from tests.planner.problems import latency_service as service
from traces.synthesis import Gamma, synthesise

POLICIES = [RoundRobin(), RandomPlacement(), LeastLoaded(), SelectiveReplication(requests=500)]
NAMES = ("a", "b", "c")


def situation(*, services=None, profiles=None, nodes=(("node-0", "gpu", 2), ("node-1", "gpu", 2)), seed=1, cv=1.0):
    wanted = services or [service(name, (f"model-{name}", 0.9), deadline_s=0.2) for name in NAMES]
    known = profiles or [profile(f"model-{name}", weights_gib=5.0) for name in NAMES]
    rates = {each.name: 20.0 for each in wanted}
    history = synthesise({name: Gamma(rate_rps=rate, cv=cv) for name, rate in rates.items()}, duration_s=20, seed=1)
    return Situation(
        cluster=cluster(*nodes, memory_gib=12),
        services=Services(services=tuple(wanted)),
        profiles=ProfileLibrary(known),
        demand=demand(**rates),
        history=history,
        seed=seed,
    )


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_nothing_that_fits_nowhere_is_an_error_that_says_what_to_check(policy):
    huge = [profile(f"model-{name}", weights_gib=500.0) for name in NAMES]
    with pytest.raises(InvalidInput, match=f"policy {policy.name}.*\n?.*memory"):
        policy.decide(situation(profiles=huge))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_memory_pins_forbids_and_budgets_hold(policy, seed):
    wanted = [
        service("a", ("model-a", 0.9), deadline_s=0.2, max_gpus=1),
        service("b", ("model-b", 0.9), deadline_s=0.2, pin=("node-1",)),
        service("c", ("model-c", 0.9), deadline_s=0.2, forbid=("node-1/0",)),
    ]
    plan = policy.decide(situation(services=wanted, seed=seed)).plan
    limit = 12 * 2**30 * (1 - HEADROOM_RATIO)
    for group in plan.groups:
        assert sum(entry.memory_bytes[0] for entry in group.loadout) <= limit
    hosts = {name: [group.id for group in plan.groups if group.entry(name)] for name in NAMES}
    assert len(hosts["a"]) <= 1
    assert all(host.startswith("node-1") for host in hosts["b"])
    assert "node-1/0" not in hosts["c"]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_the_same_seed_gives_the_same_plan(policy):
    assert policy.decide(situation()).plan.placement_digest == policy.decide(situation()).plan.placement_digest


def test_random_placements_differ_by_seed():
    digests = {RandomPlacement().decide(situation(seed=seed)).plan.placement_digest for seed in range(5)}
    assert len(digests) > 1


def test_round_robin_goes_from_gpu_to_gpu():
    """Three services on four GPUs that hold two each: 8 places, every service two or three times."""
    plan = RoundRobin().decide(situation()).plan
    assert len(plan.groups) == 4
    assert {len(group.loadout) for group in plan.groups} == {2}
    assert {len(routes) for routes in plan.routes.values()} <= {2, 3}


def test_selective_replication_does_not_replicate_what_gains_nothing():
    """One GPU each serves everything; more replicas would only look busy."""
    calm = [service(name, (f"model-{name}", 0.9), deadline_s=2.0) for name in NAMES]
    plan = SelectiveReplication(requests=300).decide(situation(services=calm)).plan
    assert sum(len(group.loadout) for group in plan.groups) <= 6


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_a_trace_of_workflows_alone_gets_a_replica_of_every_stage(policy):
    there = situation()
    edges = [{"from": "a", "to": "b"}, {"from": "b", "to": "c"}]
    flow = {"name": "flow", "slo": {"deadline": 0.6}, "edges": edges}
    flowing = dataclasses.replace(
        there,
        services=Services.model_validate({**there.services.model_dump(by_alias=True), "workflows": [flow]}),
        history=synthesise({"flow": Gamma(rate_rps=20, cv=1)}, duration_s=20, seed=1),
    )
    assert policy.decide(flowing).plan.routes.keys() == set(NAMES)


def test_a_model_larger_than_a_gpu_takes_the_smallest_parallelism_that_holds_it():
    known = [profile("model-a", weights_gib=20.0, parallelisms=((1, 1), (2, 1), (4, 1)))]
    there = situation(services=[service("a", ("model-a", 0.9), deadline_s=0.2)], profiles=known)
    plan = RoundRobin().decide(there).plan
    assert {(group.tp, group.gpus) for group in plan.groups} == {(2, (0, 1))}


def test_the_most_accurate_variant_that_can_be_placed_is_taken():
    known = [profile("good", weights_gib=50.0), profile("fair"), profile("poor")]
    wanted = [service("a", ("poor", 0.3), ("good", 0.9), ("fair", 0.6), deadline_s=0.2)]
    plan = LeastLoaded().decide(situation(services=wanted, profiles=known)).plan
    assert {entry.variant for group in plan.groups for entry in group.loadout} == {"fair"}


def test_a_copied_draft_goes_its_own_way():
    draft = Draft(situation())
    tile = next(draft.tiles("a"))
    draft.copy().place("a", tile)
    assert draft.replicas("a") == 0
    assert tile in list(draft.tiles("a"))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_a_service_that_generates_is_served_token_by_token_where_the_plan_is_applied(policy):
    slo = GenerationSlo(ttft_s=2.0, tpot_s=0.1)
    chat = GenerationService(name="chat", slo=slo, variants=(Variant(model="model-chat"),))
    wanted = [chat, service("a", ("model-a", 0.9), deadline_s=0.2)]
    known = [phased("model-chat"), profile("model-a", weights_gib=5.0)]
    plan = policy.decide(situation(services=wanted, profiles=known)).plan
    entries = [entry for group in plan.groups for entry in group.loadout]
    assert {entry.service for entry in entries} == {"chat", "a"}
    rules = token_rules(chat, known[0], 1, 1)
    assert rules.prefill_tokens
    for entry in entries:
        assert entry.tokens == (rules if entry.service == "chat" else None)
