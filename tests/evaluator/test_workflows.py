from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from evaluator import Settings, evaluate
from evaluator.changes import Failure
from evaluator.workflows import compile_workflows, group_places, stages_of
from plans import Cluster, Services
from tests.plans.strategies import cluster, entry, group, plan
from traces.table import RequestTrace

NAMES = ("detect", "segment", "classify", "embed")


def services(edges, deadline=1.0, **workflow):
    return Services.model_validate(
        {
            "services": [{"name": n, "slo": {"deadline": 1}, "variants": [{"model": f"{n}-model"}]} for n in NAMES],
            "workflows": [{"name": "flow", "slo": {"deadline": deadline}, "edges": edges, **workflow}],
        }
    )


def edge(source, target, **fields):
    return {"from": source, "to": target, **fields}


def serving(service, node, latency_s, gpu=0):
    return group(node, (gpu,), [entry(service, max_batch=1, stage_latency_s=((latency_s,),))])


DIAMOND = [
    edge("embed", "detect"),
    edge("embed", "segment", fanout=2, bytes=100),
    edge("segment", "classify", probability=0.5),
    edge("detect", "classify"),
]


def test_stages_are_in_topological_order_and_of_several_the_first_mentioned_goes_first():
    assert stages_of(services(DIAMOND).workflow("flow")) == ("embed", "detect", "segment", "classify")
    late = [edge("segment", "detect"), edge("classify", "segment"), edge("embed", "detect")]
    assert stages_of(services(late).workflow("flow")) == ("classify", "segment", "embed", "detect")


def test_arrays_number_stages_and_edges():
    one = plan([serving(name, f"node-{i % 2}", 0.1 * (i + 1), gpu=i) for i, name in enumerate(NAMES)])
    arrays = compile_workflows(services(DIAMOND, deadline=0.7, joins={"classify": "any"}), one)
    assert arrays.stage_first.tolist() == [0, 4]
    assert arrays.edge_first.tolist() == [0, 4]
    assert arrays.deadline_s.tolist() == [0.7]
    assert arrays.service.tolist() == [3, 0, 1, 2]
    assert arrays.entry.tolist() == [True, False, False, False]
    assert arrays.join_any.tolist() == [False, False, False, True]
    assert arrays.source.tolist() == [0, 0, 2, 1]
    assert arrays.target.tolist() == [1, 2, 3, 3]
    assert arrays.fanout.tolist() == [1, 2, 1, 1]
    assert arrays.payload_bytes.tolist() == [0, 100, 0, 0]
    assert np.isnan(arrays.probability).tolist() == [True, True, False, True]


def test_the_tail_is_the_longest_path_behind_a_stage_by_its_fastest_replicas():
    """embed leads to detect (0.1 s) or segment (the faster of 0.2 s and 0.9 s), and both to classify (0.3 s)."""
    one = plan(
        [
            serving("detect", "node-0", 0.1, 0),
            serving("segment", "node-0", 0.2, 1),
            serving("segment", "node-0", 0.9, 2),
            serving("classify", "node-0", 0.3, 3),
        ]
    )
    arrays = compile_workflows(services(DIAMOND), one)
    assert arrays.tail_s.tolist() == pytest.approx([0.5, 0.3, 0.3, 0.0])


def test_without_workflows_the_arrays_are_empty():
    none = Services.model_validate({"services": services(DIAMOND).model_dump(by_alias=True)["services"]})
    arrays = compile_workflows(none, plan([]))
    assert arrays.stage_first.tolist() == arrays.edge_first.tolist() == [0]
    assert arrays.service.shape == (0,)


def test_places_know_bandwidths_and_without_a_cluster_take_no_time():
    known = cluster(2)
    places = group_places(["node-1", "node-0", "node-1"], known)
    assert places.node.tolist() == [0, 1, 0]
    assert np.isinf(places.intra_bandwidth).all()
    assert places.network_bandwidth == known.network.bandwidth
    assert places.network_latency_s == known.network.latency_s
    assert (group_places(["a"], None).network_bandwidth, group_places(["a"], None).network_latency_s) == (np.inf, 0.0)


# In a run


def run(services, one, rows=(0.0,), *, known=None, changes=(), **chosen):
    trace = RequestTrace(pd.DataFrame({"arrival_s": list(rows), "service": "flow"}))
    return evaluate(one, services, trace, settings=Settings(**chosen), cluster=known, changes=changes)


def chain(*nodes, latency_s=0.1):
    """One replica of each service, each on a node of its own choice."""
    return plan([serving(n, node, latency_s, gpu=i) for i, (n, node) in enumerate(zip(NAMES, nodes, strict=False))])


def test_stages_follow_each_other_and_the_instance_ends_with_the_last():
    flow = services([edge("detect", "segment"), edge("segment", "classify")])
    found = run(flow, chain("node-0", "node-0", "node-0"), overhead_s=0.02, response_s=0.03)
    assert found.requests["latency_s"].tolist() == pytest.approx([0.02 + 0.3 + 0.03])
    assert found.requests["outcome"].tolist() == ["good"]
    assert found.summary.service("flow").good == 1
    assert found.summary.service("detect").offered == 0


def test_an_instance_has_no_replica_and_no_batch_of_its_own():
    one = plan([serving("detect", "node-0", 0.1), serving("segment", "node-1", 0.2)])
    trace = RequestTrace(pd.DataFrame({"arrival_s": [0.0], "service": "flow"}))
    found = evaluate(one, services([edge("detect", "segment")]), trace).requests.iloc[0]
    assert found["outcome"] == "good"
    assert found[["group", "variant", "batch_size", "accuracy"]].isna().all()


def test_fan_out_makes_calls_that_the_stage_works_off_one_by_one():
    found = run(services([edge("detect", "segment", fanout=3)], deadline=9), chain("node-0", "node-0"))
    assert found.requests["latency_s"].tolist() == pytest.approx([0.1 + 3 * 0.1])


def test_a_join_of_all_waits_for_the_slower_and_one_of_any_for_the_faster():
    edges = [edge("detect", "classify"), edge("segment", "classify")]
    one = plan(
        [serving("detect", "node-0", 0.1), serving("segment", "node-0", 0.3, 1), serving("classify", "node-0", 0.1, 2)]
    )
    assert run(services(edges), one).requests["latency_s"].tolist() == pytest.approx([0.4])
    assert run(services(edges, joins={"classify": "any"}), one).requests["latency_s"].tolist() == pytest.approx([0.2])


def test_transfers_take_time_by_placement():
    """1 MB: 1 ms over the 1e9 B/s of a node, 0.05 + 10 ms over a network of 1e8 B/s, nothing on the same group."""
    known = Cluster.model_validate(
        {
            "gpu_types": {"tiny": {"memory": 1000}},
            "nodes": [
                {"name": f"node-{n}", "gpus": {"type": "tiny", "count": 4}, "intra_bandwidth": 1e9} for n in (0, 1)
            ],
            "network": {"bandwidth": 1e8, "latency": 0.05},
        }
    )
    flow = services([edge("detect", "segment", bytes=1_000_000)])
    two = [entry(name, max_batch=1, stage_latency_s=((0.1,),)) for name in ("detect", "segment")]
    for one, transfer_s in (
        (plan([group("node-0", (0,), two)]), 0.0),
        (chain("node-0", "node-0"), 0.001),
        (chain("node-0", "node-1"), 0.06),
    ):
        assert run(flow, one, known=known).requests["latency_s"].tolist() == pytest.approx([0.2 + transfer_s])
    assert run(flow, chain("node-0", "node-1")).requests["latency_s"].tolist() == pytest.approx([0.2])


def test_calls_are_due_early_enough_for_what_is_behind_them():
    """0.35 s are enough for 3 x 0.1 s; with 0.25 s the first stage is dropped at once: nothing behind it can be met."""
    flow = [edge("detect", "segment"), edge("segment", "classify")]
    one = chain("node-0", "node-0", "node-0")
    assert run(services(flow, deadline=0.35), one).requests["outcome"].tolist() == ["good"]
    hopeless = run(services(flow, deadline=0.25), one).requests
    assert hopeless["reason"].tolist() == ["deadline cannot be met"]
    assert hopeless["outcome"].tolist() == ["dropped"]
    late = run(services(flow, deadline=0.25), one, early_drop=False).requests
    assert late["outcome"].tolist() == ["late"]


def test_a_lost_input_ends_the_instance_unless_another_may_take_its_place():
    """segment has no replica. A join of all needs it; a join of any goes on with detect, and ends without both."""
    edges = [edge("detect", "classify"), edge("segment", "classify")]
    one = plan([serving("detect", "node-0", 0.1), serving("classify", "node-0", 0.1, 2)])
    ended = run(services(edges), one).requests
    assert (ended["outcome"].tolist(), ended["reason"].tolist()) == (["failed"], ["no route"])
    assert run(services(edges, joins={"classify": "any"}), one).requests["outcome"].tolist() == ["good"]
    neither = run(services(edges, joins={"classify": "any"}), plan([serving("classify", "node-0", 0.1)])).requests
    assert neither["reason"].tolist() == ["no route"]


def test_calls_of_an_ended_instance_leave_their_queues():
    """The instance fails at once for want of segment; its call of detect is gone, so the plain request starts at 0."""
    flow = services([edge("detect", "classify"), edge("segment", "classify")])
    trace = RequestTrace(pd.DataFrame({"arrival_s": [0.0, 0.0], "service": ["flow", "detect"]}))
    found = evaluate(plan([serving("detect", "node-0", 0.1)]), flow, trace).requests
    assert found["outcome"].tolist() == ["failed", "good"]
    assert found["latency_s"].tolist()[1] == pytest.approx(0.1)


def test_a_switch_takes_each_edge_as_often_as_it_says():
    """detect to segment (0.2 s in all) with 0.7, else to classify (0.5 s in all); the same for fan-out below one."""
    flow = services(
        [edge("detect", "segment", probability=0.7), edge("detect", "classify", probability=0.3)], deadline=9
    )
    one = plan(
        [serving("detect", "node-0", 0.1), serving("segment", "node-0", 0.1, 1), serving("classify", "node-0", 0.4, 2)]
    )
    rows = [float(i) for i in range(2000)]
    latency_s = run(flow, one, rows, seed=3).requests["latency_s"].round(6)
    assert set(latency_s) == {0.2, 0.5}
    assert (latency_s == 0.2).mean() == pytest.approx(0.7, abs=0.03)
    part = run(services([edge("detect", "segment", fanout=0.25)], deadline=9), one, rows, seed=3).requests["latency_s"]
    assert (part.round(6) == 0.2).mean() == pytest.approx(0.25, abs=0.03)


def test_an_instance_that_its_node_takes_down_is_retried_by_its_calls():
    """detect runs on node-0 until 0.1; at 0.05 the node fails, is found so at 0.25, and the call goes to node-1."""
    one = plan(
        [serving("detect", "node-0", 0.1), serving("detect", "node-1", 0.1), serving("segment", "node-1", 0.1, 1)]
    )
    flow = services([edge("detect", "segment")], deadline=9)
    change = Failure(at_s=0.05, node="node-0")
    found = run(flow, one, changes=[change], detection_s=0.2).requests
    assert found["latency_s"].tolist() == pytest.approx([0.25 + 0.2])
    lost = run(flow, one, changes=[change], detection_s=0.2, retries=0).requests
    assert lost["reason"].tolist() == ["lost with its node"]
