from __future__ import annotations

from executor.assignment import desired_state, routing_table
from executor.state import GenerationRules, ReplicaKey
from plans.plan import Group, LoadoutEntry, Plan, Route, SolverReport, TokenRules


def entry(service, variant="resnet-18", deadline_s=0.2):
    return LoadoutEntry(
        service=service,
        variant=variant,
        max_batch=2,
        rate_rps=1,
        memory_bytes=(7,),
        deadline_s=deadline_s,
        stage_latency_s=((0.25,), (0.5,)),
    )


PLAN = Plan(
    solver=SolverReport(name="hand", status="feasible", objective=0, bound=0, gap=0, wall_s=0, seed=0),
    groups=(
        Group(id="node-a/0", node="node-a", gpus=(0,), loadout=(entry("detect"), entry("read"))),
        Group(id="node-b/0", node="node-b", gpus=(0,), loadout=(entry("detect", deadline_s=0.1),)),
    ),
    routes={
        "detect": (Route(group="node-a/0", weight=0.25), Route(group="node-b/0", weight=0.75)),
        "read": (Route(group="node-a/0", weight=1),),
    },
)
ADDRESSES = {"node-a": "127.0.0.1:1", "node-b": "127.0.0.1:2"}


def test_a_service_that_generates_has_the_memory_beyond_its_weights_and_a_deadline_for_the_first_token():
    rules = TokenRules(ttft_s=0.5, tpot_s=0.05, prefill_tokens=(8.0, 16.0), prefill_s=(0.1, 0.2))
    chat = entry("detect").model_copy(update={"tokens": rules, "memory_bytes": (100,), "weight_bytes": 30})
    group = PLAN.groups[1].model_copy(update={"loadout": (chat,)})
    plan = PLAN.model_copy(update={"groups": (PLAN.groups[0], group)})
    (replica,) = desired_state(plan, "node-b", 1).groups[0].replicas
    assert replica.generation == GenerationRules(
        ttft_s=0.5, tpot_s=0.05, kv_bytes=70, prefill_tokens=(8.0, 16.0), prefill_s=(0.1, 0.2)
    )
    detect, read = routing_table(plan, ADDRESSES, 1).services
    assert (detect.first_token_s, read.first_token_s) == (0.5, None)


def test_a_node_gets_its_own_groups_of_the_plan():
    state = desired_state(PLAN, "node-b", 4)
    assert (state.generation, state.node, state.placement_digest) == (4, "node-b", PLAN.placement_digest)
    assert state.keys() == (ReplicaKey(group="node-b/0", service="detect", variant="resnet-18"),)
    assert state.groups[0].replicas[0].batch_latency_s == (0.25, 0.5)


def test_a_node_outside_the_plan_gets_nothing_to_run():
    assert desired_state(PLAN, "node-c", 1).groups == ()


def test_routes_carry_the_weights_of_the_plan():
    table = routing_table(PLAN, ADDRESSES, 4)
    assert {backend.node: backend.address for backend in table.backends} == ADDRESSES
    assert [(target.group, target.weight) for target in table.services[0].targets] == [
        ("node-a/0", 0.25),
        ("node-b/0", 0.75),
    ]


def test_a_service_without_a_deadline_of_its_own_takes_the_tightest_of_its_replicas():
    assert routing_table(PLAN, ADDRESSES, 4).services[0].deadline_s == 0.1


def test_replicas_that_are_not_loaded_leave_their_share_to_the_others():
    deferred = {
        ReplicaKey(group="node-a/0", service="detect", variant="resnet-18"),
        ReplicaKey(group="node-a/0", service="read", variant="resnet-18"),
    }
    detect, read = routing_table(PLAN, ADDRESSES, 4, without=deferred).services
    assert [(target.group, target.weight) for target in detect.targets] == [("node-b/0", 1.0)]
    assert read.targets == ()
