"""The naive simulator against cases worked out by hand: whoever is judge must be right himself."""

from __future__ import annotations

import pytest

from plans import Cluster, Plan, Route, Services
from tests.evaluator import naive
from tests.evaluator.naive_parts import Failure, NewPlan, Recovery, Row, Scenario, TokenCosts, View, mix, quantile
from tests.plans.strategies import SOLVER, entry, group


def services(*latency, video_fps=None, chat=None, workflows=()):
    """Services of class latency as (name, deadline), maybe a video and a chat."""
    made = [{"name": name, "slo": {"deadline": d}, "variants": [{"model": f"{name}-model"}]} for name, d in latency]
    if video_fps is not None:
        slo = {"fps": video_fps}
        made.append({"name": "video", "class": "frequency", "slo": slo, "variants": [{"model": "video-model"}]})
    if chat is not None:
        slo = {"ttft": chat[0], "tpot": chat[1]}
        made.append({"name": "chat", "class": "generation", "slo": slo, "variants": [{"model": "chat-model"}]})
    return Services.model_validate({"services": made, "workflows": workflows})


def one_group(*entries, node="node-0"):
    return Plan(
        solver=SOLVER,
        groups=(group(node, (0,), list(entries)),),
        routes={e.service: (Route(group=f"{node}/0", weight=1.0),) for e in entries},
    )


def takes(service, *batches, **fields):
    """An entry whose batch of b takes batches[b - 1]."""
    return entry(service, max_batch=len(batches), stage_latency_s=tuple((b,) for b in batches), **fields)


def simulate(plan, known, *arrivals, **told):
    rows = [Row(arrival_s=a[0], name=a[1], stream=a[2] if len(a) > 2 else None) for a in arrivals]
    return naive.run(Scenario(plan=plan, services=known, rows=told.pop("rows", rows), **told))


def ends(results):
    return [(r.outcome, r.finish_s) if r.finish_s is not None else (r.outcome, r.reason) for r in results]


def test_draws_are_those_of_splitmix64():
    """The first numbers of the generator with seed 0, as its authors publish them."""
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    assert mix(2 * 0x9E3779B97F4A7C15 % 2**64) == 0x6E789E6AA1B965F4


def test_the_quantile_function_goes_through_the_percentiles():
    assert [quantile((1.0, 2.0, 4.0), u) for u in (0.0, 0.25, 0.5, 0.95, 0.99)] == [0.5, 0.75, 1.0, 2.0, 4.0]


def test_a_head_that_bears_no_full_batch_gives_way_when_more_wait():
    known, plan = services(("a", 2.0)), one_group(takes("a", 1.0, 1.5))
    told = [(0.0, "a"), (0.25, "a"), (0.5, "a"), (0.75, "a")]
    dropped = "gave way to a full batch"
    assert ends(simulate(plan, known, *told)) == [
        ("good", 1.0), ("dropped", dropped), ("good", 2.5), ("good", 2.5)
    ]  # fmt: skip


def test_batch_delay_waits_for_company_but_not_beyond_the_head_s_deadline():
    known, plan = services(("a", 4.0)), one_group(takes("a", 1.0, 2.0, 3.0))
    assert ends(simulate(plan, known, (0.0, "a"), (0.25, "a"), batch_delay_s=0.5)) == [("good", 2.5), ("good", 2.5)]
    assert ends(simulate(plan, known, (0.0, "a"), batch_delay_s=9.0)) == [("good", 2.0)]
    assert ends(simulate(plan, known, *[(0.25, "a")] * 3, batch_delay_s=0.5)) == [("good", 3.25)] * 3


def test_frames_gather_until_enough_are_there_or_it_is_time():
    known, plan = services(video_fps=0.25), one_group(takes("video", 1.0, 1.25, multi_frame=2))
    told = [(0.0, "video", "s"), (1.0, "video", "t"), (2.0, "video", "s")]
    got = simulate(plan, known, *told)
    assert ends(got) == [("good", 3.25), ("good", 4.75), ("good", 3.25)]
    assert [r.batch for r in got] == [2, 1, 2]


def test_batches_that_run_together_take_longer():
    plan, known = one_group(takes("a", 1.0)), services(("a", 9.0))
    factors = {("a", "a-model"): {2: 1.5}}
    got = simulate(plan, known, *[(0.0, "a")] * 4, concurrency=3, interference=factors)
    assert ends(got) == [("good", 1.0), ("good", 1.5), ("good", 3.0), ("good", 4.0)]


def test_admission_predicts_the_finish_it_then_meets():
    told = {"order": "fifo", "admission": "arrival"}
    plan, known = one_group(takes("a", 1.0), takes("b", 2.0)), services(("a", 2.0), ("b", 5.0))
    got = simulate(plan, known, (0.0, "b"), (0.0, "a"), (0.0, "b"), (2.0, "a"), **told)
    assert ends(got) == [("good", 2.0), ("dropped", "not admitted"), ("good", 4.0), ("dropped", "not admitted")]


def test_credits_shift_load_away_from_a_replica_whose_queue_is_long():
    plan = Plan(
        solver=SOLVER,
        groups=(group("node-0", (0,), [takes("a", 8.0)]), group("node-1", (0,), [takes("a", 0.25)])),
        routes={"a": (Route(group="node-0/0", weight=0.5), Route(group="node-1/0", weight=0.5))},
    )
    rows = [Row(arrival_s=i * 0.5, name="a") for i in range(100)]
    told = {"routing": "credits", "credit_target": 0, "early_drop": False}
    got = simulate(plan, services(("a", 1.0)), rows=rows, **told)
    assert sum(r.group == "node-0/0" for r in got) < 30


COSTS = TokenCosts(prefill=[(10, 1.0), (20, 2.0)], decode_s=[0.5, 0.5], decode_token_s=0.0)


def chat(*lengths, costs=COSTS, largest=2, slo=(10.0, 1.0)):
    rows = [Row(arrival_s=time, name="chat", input_tokens=p, output_tokens=n) for time, p, n in lengths]
    told = {"costs": lambda group, entry: costs, "rows": rows}
    return simulate(one_group(takes("chat", *[1.0] * largest)), services(chat=slo), **told)


def test_iterations_prefill_newcomers_and_decode_all_others():
    got = chat((0.0, 10, 3), (0.25, 10, 1))
    # 0-1 prefill of the first; 1-2 of the second, which ends; decodes 2-2.5 and 2.5-3.
    assert ends(got) == [("good", 3.0), ("good", 2.0)]
    assert [(r.ttft_s, r.tpot_s) for r in got] == [(1.0, 1.0), (1.75, 0.0)]


def test_a_sequence_is_preempted_when_memory_runs_out_and_starts_again_with_its_tokens():
    tight = TokenCosts(prefill=[(10, 1.0)], decode_s=[0.5, 0.5], decode_token_s=0.0, kv_limit_tokens=24)
    got = chat((0.0, 10, 4), (0.0, 10, 4), costs=tight)
    # Prefill of both: 0-2 (20 tokens). Decode to 2.5: 22 + 2 = 24 tokens fit. Then 24 + 2 do not: the second leaves
    # with 2 tokens; the first ends at 3.5. The second prefills its 12 tokens until 4.7, and decodes once more.
    assert ends(got) == [("good", 3.5), ("late", pytest.approx(5.2))]
    assert ends(chat((0.0, 20, 5), costs=tight)) == [("dropped", "larger than the KV memory")]


def test_a_first_token_that_would_come_too_late_is_not_begun():
    assert ends(chat((0.0, 10, 2), (0.0, 10, 2), slo=(1.5, 5.0), largest=1)) == [
        ("good", 1.5), ("dropped", "deadline cannot be met")
    ]  # fmt: skip


CLUSTER = Cluster.model_validate(
    {
        "gpu_types": {"tiny": {"memory": 1000}},
        "nodes": [{"name": f"node-{n}", "gpus": {"type": "tiny", "count": 2}} for n in range(2)],
        "network": {"bandwidth": 1000, "latency": 0.25},
    }
)


def test_a_new_plan_holds_when_its_loads_are_done_and_the_old_replica_serves_its_queue():
    before = one_group(takes("a", 1.0))
    after = one_group(takes("a", 0.5, load_s=2.0), node="node-1")
    got = simulate(
        before,
        services(("a", 9.0)),
        *[(t, "a") for t in (0.0, 2.75, 2.75, 3.0)],
        cluster=CLUSTER,
        changes=[NewPlan(time_s=1.0, plan=after)],
    )
    assert ends(got) == [("good", 1.0), ("good", 3.75), ("good", 4.75), ("good", 3.5)]
    assert [r.group for r in got] == ["node-0/0"] * 3 + ["node-1/0"]


def test_what_has_no_room_is_loaded_when_the_old_is_gone():
    before = one_group(takes("a", 1.0, memory_bytes=(600,), deadline_s=2.0))
    after = one_group(takes("a", 0.5, memory_bytes=(600,), variant="other", load_s=3.0))
    told = {"cluster": CLUSTER, "changes": [NewPlan(time_s=1.0, plan=after)]}
    got = simulate(before, services(("a", 9.0)), *[(t, "a") for t in (0.75, 1.0, 5.75, 6.0)], **told)
    assert ends(got) == [("good", 1.75), ("failed", "no route"), ("failed", "no route"), ("good", 6.5)]


def test_what_a_failed_node_held_enters_again_when_that_is_known():
    plan = Plan(
        solver=SOLVER,
        groups=(group("node-0", (0,), [takes("a", 2.0)]), group("node-1", (0,), [takes("a", 1.0)])),
        routes={"a": (Route(group="node-0/0", weight=0.5), Route(group="node-1/0", weight=0.5))},
    )
    told = {"changes": [Failure(time_s=1.0, node="node-0"), Recovery(time_s=4.0, node="node-0")], "detection_s": 1.0}
    arrivals = [(0.0, "a"), (0.0, "a"), (1.5, "a"), (4.25, "a"), (4.5, "a"), (4.5, "a")]
    got = simulate(plan, services(("a", 5.0)), *arrivals, **told)
    # The first ran on node-0, the third waits there; both enter again at 2. node-0 is back at 4.5, after its load.
    assert ends(got) == [("good", 3.0), ("good", 1.0), ("good", 4.0), ("good", 5.25), ("good", 6.25), ("good", 6.5)]
    lost = ("failed", "lost with its node")
    assert ends(simulate(plan, services(("a", 5.0)), *arrivals, retries=0, **told))[0] == lost


def test_a_controller_is_asked_again_when_its_plan_is_in_place():
    turns = []

    def controller(view: View):
        turns.append((view.now_s, view.arrivals.get("a", 0)))
        return (one_group(takes("a", 0.5, load_s=1.0), node="node-1"), 0.5) if len(turns) == 1 else None

    told = {"cluster": CLUSTER, "controller": controller, "interval_s": 1.0}
    got = simulate(one_group(takes("a", 1.0)), services(("a", 9.0)), *[(i * 0.75, "a") for i in range(7)], **told)
    assert turns == [(1.0, 2), (4.0, 4)]
    assert [r.group for r in got] == ["node-0/0"] * 4 + ["node-1/0"] * 3


def flow(*edges, joins=None, deadline=20.0):
    keys = ("from", "to", "fanout", "bytes", "probability")
    made = [{k: v for k, v in zip(keys, edge, strict=False) if v is not None} for edge in edges]
    return {"name": "flow", "slo": {"deadline": deadline}, "edges": made, "joins": joins or {}}


def test_a_workflow_runs_through_its_stages_and_pays_for_transfers():
    plan = Plan(
        solver=SOLVER,
        groups=(group("node-0", (0,), [takes("a", 1.0)]), group("node-1", (0,), [takes("b", 2.0)])),
        routes={"a": (Route(group="node-0/0", weight=1.0),), "b": (Route(group="node-1/0", weight=1.0),)},
    )
    known = services(("a", 9.0), ("b", 9.0), workflows=[flow(("a", "b", 2, 500))])
    got = simulate(plan, known, (0.0, "flow"), cluster=CLUSTER, overhead_s=0.125, response_s=0.25)
    # 0.125 + 1 + (0.25 + 500 / 1000) + two calls of 2 one after the other + 0.25
    assert ends(got) == [("good", 6.125)]


@pytest.mark.parametrize(("join", "finish_s"), [("all", 4.0), ("any", 2.0)])
def test_a_join_waits_for_all_or_for_the_first(join, finish_s):
    plan = Plan(
        solver=SOLVER,
        groups=tuple(
            group("node-0", (n,), [takes(name, took)])
            for n, (name, took) in enumerate([("a", 1.0), ("b", 3.0), ("c", 1.0)])
        ),
        routes={name: (Route(group=f"node-0/{n}", weight=1.0),) for n, name in enumerate("abc")},
    )
    known = services(("a", 9.0), ("b", 9.0), ("c", 9.0), workflows=[flow(("a", "c"), ("b", "c"), joins={"c": join})])
    assert ends(simulate(plan, known, (0.0, "flow"))) == [("good", finish_s)]


def test_a_lost_call_ends_its_instance_unless_another_input_may_do():
    plan = one_group(takes("a", 1.0), takes("c", 1.0))
    for join, end in [("all", ("failed", "no route")), ("any", ("good", 2.0))]:
        known = services(
            ("a", 9.0), ("b", 9.0), ("c", 9.0), workflows=[flow(("a", "c"), ("b", "c"), joins={"c": join})]
        )
        assert ends(simulate(plan, known, (0.0, "flow"))) == [end]


def test_what_has_not_ended_by_the_end_of_the_run_is_in_flight_and_what_comes_later_is_not_offered():
    plan, known = one_group(takes("a", 1.0)), services(("a", 9.0))
    got = simulate(plan, known, (0.0, "a"), (0.5, "a"), (1.0, "a"), (1.5, "a"), until_s=1.0)
    assert [r.outcome if r else None for r in got] == ["good", "in_flight", "in_flight", None]
