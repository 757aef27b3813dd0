from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from evaluator import Settings, evaluate
from evaluator.changes import Failure, PlanChange, Recovery, check_changes, check_failure, random_failures, schedule
from plans import InvalidInput, Services
from tests.plans.strategies import cluster, entry, group, plan
from traces.table import RequestTrace


def one(service, node="node-0", gpu=0, **fields):
    return group(node, (gpu,), [entry(service, **fields)])


def test_a_node_loads_one_after_the_other_and_nodes_work_side_by_side():
    """detect stays; node-0 loads 2 + 3 s, node-1 loads 4 s; the flip comes when the slower of both is done."""
    stays = one("detect")
    target = plan(
        [
            stays,
            one("segment", gpu=1, load_s=2.0, weight_bytes=90),
            one("classify", gpu=2, load_s=3.0, weight_bytes=80),
            one("embed", node="node-1", load_s=4.0),
        ]
    )
    found = schedule(plan([stays]), target, cluster(), start_s=10.0)
    spans = {span.service: (span.start_s, span.end_s) for span in found.early_loads}
    assert spans == {"segment": (10, 12), "classify": (12, 15), "embed": (10, 14)}
    assert (found.flip_s, found.end_s) == (15, 15)
    assert found.waves == ()


def test_what_leaves_is_unloaded_a_deadline_after_the_flip():
    found = schedule(
        plan([one("detect", deadline_s=0.7), one("segment", gpu=1)]),
        plan([one("segment", gpu=1)]),
        cluster(),
        start_s=1,
    )
    (wave,) = found.waves
    assert [(span.service, span.start_s, span.end_s) for span in wave.drains] == [("detect", 1, 1.7)]
    assert (found.flip_s, found.end_s) == (1, 1.7)


def test_what_has_no_room_is_loaded_when_the_last_has_gone():
    """Memory 1000: 600 + 600 do not fit, so segment waits for detect's deadline after the flip at once."""
    before = plan([one("detect", memory_bytes=(600,), deadline_s=0.5)])
    after = plan([one("segment", memory_bytes=(600,), load_s=2.0)])
    found = schedule(before, after, cluster(), start_s=3.0)
    assert found.early_loads == ()
    assert found.flip_s == 3.0
    (wave,) = found.waves
    assert [(span.service, span.start_s, span.end_s) for span in wave.loads] == [("segment", 3.5, 5.5)]
    assert (wave.end_s, found.end_s) == (5.5, 5.5)


def test_replicas_that_are_replaced_in_turn_serve_until_their_wave():
    """Two full GPUs: the second goes on at its planned rate while the first is drained (1 s) and loaded (2 s)."""
    before, after = (
        plan([one("detect", gpu=n, variant=v, memory_bytes=(600,), load_s=2.0) for n in range(2)])
        for v in ("small", "large")
    )
    found = schedule(before, after, cluster(), start_s=0.0)
    assert [[span.group for span in (*wave.drains, *wave.loads)] for wave in found.waves] == [
        ["node-0/0", "node-0/0"],
        ["node-0/1", "node-0/1"],
    ]
    assert [wave.end_s for wave in found.waves] == [3.0, 6.0]
    assert found.old_weights == {("node-0/0", "detect"): 0.5, ("node-0/1", "detect"): 0.5}


def test_requests_are_answered_while_replicas_are_replaced_in_turn():
    """Two groups are cut from TP to PP in place, for which there is no room: each serves while the other is changed."""
    before, after = (
        plan(
            [
                group(
                    "node-0",
                    gpus,
                    [entry("detect", 2, pp, memory_bytes=(600, 600), load_s=2.0, stage_latency_s=stages, max_batch=1)],
                    pp=pp,
                )
                for gpus in ((0, 1), (2, 3))
            ]
        )
        for pp, stages in ((1, ((0.1,),)), (2, ((0.05, 0.05),)))
    )
    found = run(before, [0.5 * n for n in range(20)], [PlanChange(at_s=1.0, plan=after)])
    assert set(found.requests["outcome"]) == {"good"}


def test_nothing_to_do_takes_no_time():
    same = plan([one("detect")])
    assert schedule(same, same, cluster(), start_s=2.0).end_s == 2.0


def test_random_failures_alternate_per_node_and_repeat_with_their_seed():
    """Law: the same seed gives the same events. A year of nodes has about the mean times asked for."""
    year_s = 365 * 86400.0
    events = random_failures(cluster(), mtbf_s=36_000, mttr_s=3_600, until_s=year_s, seed=4)
    assert events == random_failures(cluster(), mtbf_s=36_000, mttr_s=3_600, until_s=year_s, seed=4)
    assert events != random_failures(cluster(), mtbf_s=36_000, mttr_s=3_600, until_s=year_s, seed=5)
    assert [event.at_s for event in events] == sorted(event.at_s for event in events)
    for node in ("node-0", "node-1"):
        own = [event for event in events if event.node == node]
        assert [type(event) for event in own[:4]] == [Failure, Recovery, Failure, Recovery]
        down = [b.at_s - a.at_s for a, b in zip(own[::2], own[1::2], strict=False)]
        assert sum(down) / len(down) == pytest.approx(3_600, rel=0.15)
        assert len(down) == pytest.approx(year_s / 39_600, rel=0.15)


def test_no_time_has_no_failures():
    assert random_failures(cluster(), mtbf_s=1, mttr_s=1, until_s=0, seed=1) == ()


def test_changes_that_make_no_sense_are_refused_all_at_once():
    with pytest.raises(InvalidInput) as caught:
        check_changes(
            [
                Failure(at_s=-1.0, node="node-0"),
                Failure(at_s=1.0, node="node-9"),
                Recovery(at_s=math.inf, node="node-0", gpu=7),
                PlanChange(at_s=0.0, plan=plan([one("detect", node="node-7")])),
            ],
            cluster(),
        )
    assert len(caught.value.faults) == 5
    with pytest.raises(InvalidInput, match="no cluster"):
        check_changes([PlanChange(at_s=0.0, plan=plan([one("detect")]))], None)
    with pytest.raises(InvalidInput, match="mtbf_s"):
        random_failures(cluster(), mtbf_s=0, mttr_s=1, until_s=1, seed=1)
    check_changes([Failure(at_s=0.0, node="anything")], None)


def test_what_fails_is_named_as_its_caller_spells_it():
    check_failure(Failure(at_s=1.0, node="node-0"), cluster(), "--fail node-0@1")
    with pytest.raises(
        InvalidInput, match=r"^--fail node-9@1: node: found 'node-9', expected a node of the cluster: node-0"
    ):
        check_failure(Failure(at_s=1.0, node="node-9"), cluster(), "--fail node-9@1")


def test_a_plan_of_another_cluster_is_refused_with_every_group():
    elsewhere = plan([one("detect", node="node-7"), one("segment", gpu=4)])
    trace = RequestTrace(pd.DataFrame({"arrival_s": [0.0], "service": "detect"}))
    with pytest.raises(InvalidInput, match="node-7") as caught:
        evaluate(elsewhere, services(), trace, cluster=cluster())
    assert [fault.found for fault in caught.value.faults] == ["'node-7'", "'node-0/4'"]
    assert evaluate(elsewhere, services(), trace).summary.good == 1


# In a run


def services():
    names = ("detect", "segment", "classify", "embed")
    return Services.model_validate(
        {"services": [{"name": n, "slo": {"deadline": 9}, "variants": [{"model": f"{n}-model"}]} for n in names]}
    )


def quick(service, node="node-0", gpu=0, latency_s=0.1, **fields):
    return one(service, node, gpu, max_batch=1, stage_latency_s=((latency_s,),), **fields)


def run(first, arrivals, changes, *, service="detect", **chosen):
    trace = RequestTrace(pd.DataFrame({"arrival_s": arrivals, "service": service}))
    return evaluate(first, services(), trace, settings=Settings(**chosen), cluster=cluster(), changes=changes)


def test_a_new_plan_serves_from_the_flip_on():
    """At 1 s a replica begins to load for 2 s on node-1; requests go there from 3 s on."""
    new = plan([quick("detect", "node-1", load_s=2.0)])
    found = run(plan([quick("detect")]), [0.0, 2.9, 3.0], [PlanChange(at_s=1.0, plan=new)])
    assert found.requests["group"].tolist() == ["node-0/0", "node-0/0", "node-1/0"]


def test_what_leaves_serves_what_it_has_queued():
    new = plan([quick("detect", "node-1", load_s=1.0)])
    found = run(plan([quick("detect")]), [0.95, 0.96, 0.97], [PlanChange(at_s=0.0, plan=new)])
    assert found.requests["group"].tolist() == ["node-0/0"] * 3
    assert found.requests["latency_s"].tolist() == pytest.approx([0.1, 0.19, 0.28])


def test_a_replica_that_stays_takes_its_new_limits():
    slow = plan([quick("detect")])
    fast = plan([quick("detect", latency_s=0.01)])
    found = run(slow, [0.0, 1.0], [PlanChange(at_s=0.5, plan=fast)])
    assert found.requests["latency_s"].tolist() == pytest.approx([0.1, 0.01])


def test_gpus_count_from_their_first_load_to_their_last_unload():
    """node-0/0 from 0 to 3 (flip) + 0.5 (drain), node-1/0 from 1 on; the run ends with the trace at 11 s."""
    new = plan([quick("detect", "node-1", load_s=2.0)])
    trace = RequestTrace(pd.DataFrame({"arrival_s": [0.0, 5.0], "service": "detect"}), duration_s=11.0)
    changes = [PlanChange(at_s=1.0, plan=new)]
    first = plan([quick("detect", deadline_s=0.5)])
    found = evaluate(first, services(), trace, cluster=cluster(), changes=changes).summary
    assert found.gpu_hours == pytest.approx((3.5 + 10.0) / 3600)


def test_a_failure_loses_what_runs_and_it_enters_again_when_it_is_known():
    """The request runs from 0; its node fails at 0.05 and is found so at 0.55; the other node serves it by 0.65."""
    two = plan([quick("detect"), quick("detect", "node-1")])
    failure = Failure(at_s=0.05, node="node-0")
    found = run(two, [0.0], [failure], detection_s=0.5).requests.iloc[0]
    assert (found["group"], found["outcome"]) == ("node-1/0", "good")
    assert found["latency_s"] == pytest.approx(0.65)
    lost = run(two, [0.0], [failure], detection_s=0.5, retries=0).requests.iloc[0]
    assert (lost["outcome"], lost["reason"]) == ("failed", "lost with its node")


def test_a_group_is_busy_until_it_fails_and_not_until_what_it_ran_would_have_ended():
    """0.4 s from 0 on, and 0.1 s from the recovery at 2 s on; each batch would have taken 1 s."""
    first = plan([quick("detect", latency_s=1.0, load_s=0.0)])
    down = [Failure(at_s=0.4, node="node-0"), Recovery(at_s=2.0, node="node-0"), Failure(at_s=2.1, node="node-0")]
    for concurrency in (1, 2):
        found = run(first, [0.0, 2.0], down, detection_s=0.1, retries=0, concurrency=concurrency).summary
        (group,) = found.groups
        assert group.utilisation * found.wall_s == pytest.approx(0.5)


def test_what_is_routed_to_a_dead_group_before_it_is_known_waits_with_the_rest():
    alone = plan([quick("detect")])
    found = run(alone, [0.1, 2.0], [Failure(at_s=0.0, node="node-0", gpu=0)], detection_s=1.0).requests
    assert found["reason"].tolist() == ["no route", "no route"]
    assert run(alone, [0.1], [Failure(at_s=0.0, node="node-0", gpu=1)]).requests["outcome"].tolist() == ["good"]


def test_a_group_comes_back_after_its_recovery_and_the_loads_of_what_it_runs():
    """Down from 0, known at 1, well at 2, loaded by 2.5: requests before that fail, later ones are served."""
    alone = plan([quick("detect", load_s=0.5)])
    changes = [Failure(at_s=0.0, node="node-0"), Recovery(at_s=2.0, node="node-0")]
    found = run(alone, [2.4, 2.5], changes, detection_s=1.0).requests
    assert found["outcome"].tolist() == ["failed", "good"]


def test_a_plan_that_is_known_during_a_transition_waits_for_its_end_and_only_the_last_counts():
    """The first change loads until 2 s and drains until 3 s; of two that wait only the last goes on, from 3 to 4 s."""
    at = [
        quick("detect", f"node-{n}", g, load_s=2.0 if (n, g) == (0, 1) else 1.0, deadline_s=1.0)
        for n in (0, 1)
        for g in (0, 1)
    ]
    changes = [PlanChange(at_s=t, plan=plan([at[i]])) for t, i in ((0.0, 1), (0.5, 2), (0.6, 3))]
    found = run(plan([at[0]]), [1.9, 3.9, 4.0], changes)
    assert found.requests["group"].tolist() == ["node-0/0", "node-0/1", "node-1/1"]


def test_groups_that_share_a_gpu_during_a_change_slow_each_other_down():
    """The old group runs from 0.9 to 1.4; at the flip at 1 the new one on the same GPU starts: twice its 0.1 s."""
    wide = group("node-0", (0, 1), [entry("detect", 2, max_batch=1, load_s=1.0, stage_latency_s=((0.1,),))])
    found = run(plan([quick("detect", latency_s=0.5)]), [0.9, 1.0], [PlanChange(at_s=0.0, plan=plan([wide]))])
    assert found.requests["latency_s"].tolist() == pytest.approx([0.5, 0.2])


def test_requests_are_conserved_through_changes_and_failures_and_runs_repeat():
    rng = np.random.default_rng(7)
    arrivals = np.cumsum(rng.exponential(0.02, 3000)).tolist()
    plans = [
        plan([quick("detect", f"node-{n}", g, load_s=0.3) for n, g in places])
        for places in ([(0, 0), (1, 0)], [(0, 1), (1, 1)])
    ]
    changes = [PlanChange(at_s=5.0 * (i + 1), plan=plans[i % 2]) for i in range(10)]
    changes += random_failures(cluster(), mtbf_s=10, mttr_s=2, until_s=60, seed=3)
    first, second = (run(plans[0], arrivals, changes, detection_s=0.1) for _ in range(2))
    pd.testing.assert_frame_equal(first.requests, second.requests)
    summary = first.summary.service("detect")
    assert summary.offered == 3000
    assert summary.in_flight == 0
    assert summary.failed > 0
    assert summary.good > 1500
