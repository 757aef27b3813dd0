from __future__ import annotations

import numpy as np
import pytest

from evaluator.workflows import compile_workflows, group_places, stages_of
from plans import Services
from tests.plans.strategies import cluster, entry, group, plan

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
