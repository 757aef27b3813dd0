"""Iterations as docs/evaluator.md, section 9, states them: every case is worked out by hand.

A token of prompt takes 1 ms, of context 0.01 ms; a decode of b sequences takes 10 ms and 1 ms more for each but one.
"""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluator import Settings, evaluate
from plans import Services
from profiles import Profile, ProfileLibrary
from tests.plans.strategies import cluster, entry, group, plan
from traces.table import RequestTrace


def profile(kv_bytes=None):
    def row(phase, batch, tokens, mean):
        return {
            "phase": phase,
            "batch": batch,
            "input_tokens": tokens,
            "latency_s": {"mean": mean},
            "stage_latency_s": [mean],
            "weight_bytes": [60],
            "peak_bytes": [100],
        }

    rows = [row("prefill", 1, tokens, tokens * 1e-3) for tokens in (1, 1000)]
    rows += [row("decode", b, c, 0.009 + 1e-3 * b + 1e-5 * b * c) for b in (1, 4) for c in (100, 200)]
    fields = {"model": "chat-model", "gpu_type": "tiny", "source": "measured", "rows": rows}
    return ProfileLibrary([Profile.model_validate(fields | {"kv_bytes_per_token": kv_bytes})])


def chat(ttft=1.0, tpot=1.0):
    slo = {"ttft": ttft, "tpot": tpot}
    detect = {"name": "detect", "slo": {"deadline": 1.0}, "variants": [{"model": "detect-model"}]}
    return Services.model_validate(
        {
            "services": [
                {"name": "chat", "class": "generation", "slo": slo, "variants": [{"model": "chat-model"}]},
                detect,
            ]
        }
    )


def host(max_batch=4, memory_bytes=1000, *others):
    table = ((0.05,),) * max_batch
    one = entry("chat", max_batch=max_batch, memory_bytes=(memory_bytes,), weight_bytes=0, stage_latency_s=table)
    return plan([group("node-0", (0,), [one, *others])])


def run(rows, one=None, services=None, kv_bytes=None, **chosen):
    """Evaluate ``rows`` of (arrival, prompt tokens, output tokens)."""
    frame = pd.DataFrame(rows, columns=["arrival_s", "input_tokens", "output_tokens"]).assign(service="chat")
    for name in ("input_tokens", "output_tokens"):
        frame[name] = frame[name].astype("Int64")
    return evaluate(
        one or host(),
        services or chat(),
        RequestTrace(frame),
        settings=Settings(**chosen),
        cluster=cluster(),
        profiles=profile(kv_bytes),
    ).requests


def test_a_prefill_makes_the_first_token_and_each_decode_one_more():
    """Prefill of 100: 0.1 s. Decodes with contexts 101 and 102: 0.01 + 0.00101 and 0.01 + 0.00102 s."""
    found = run([(0.0, 100, 3)]).iloc[0]
    assert found["ttft_s"] == pytest.approx(0.1)
    assert found["latency_s"] == pytest.approx(0.1 + 0.01101 + 0.01102)
    assert found["tpot_s"] == pytest.approx((0.01101 + 0.01102) / 2)
    assert found["outcome"] == "good"


def test_a_single_token_ends_with_the_prefill_and_has_no_time_per_token():
    found = run([(0.0, 50, 1)]).iloc[0]
    assert (found["ttft_s"], found["latency_s"], found["tpot_s"]) == (0.05, 0.05, 0.0)


def test_sequences_that_wait_together_are_prefilled_together_before_any_decode():
    found = run([(0.0, 100, 2), (0.0, 200, 2)])
    assert found["ttft_s"].tolist() == pytest.approx([0.3, 0.3])
    assert found["latency_s"].tolist() == pytest.approx([0.3 + 0.011 + 302e-5] * 2)


def test_a_newcomer_is_prefilled_between_two_decodes_and_holds_the_others_up():
    """At 0.105 the first decodes (0.1 to 0.11101); then the newcomer's prefill, and both decode together."""
    found = run([(0.0, 100, 3), (0.105, 50, 2)])
    prefilled = 0.11101 + 0.05
    end = prefilled + 0.011 + (102 + 51) * 1e-5
    assert found["ttft_s"].tolist() == pytest.approx([0.1, prefilled - 0.105])
    assert found["latency_s"].tolist() == pytest.approx([end, end - 0.105])


def test_prompts_beyond_the_limit_of_a_prefill_wait_for_the_next_but_the_first_goes_whatever_its_length():
    found = run([(0.0, 100, 1), (0.0, 100, 1), (0.0, 100, 1)], max_prefill_tokens=200)
    assert found["ttft_s"].tolist() == pytest.approx([0.2, 0.2, 0.3])
    assert run([(0.0, 100, 1)], max_prefill_tokens=10)["ttft_s"].tolist() == pytest.approx([0.1])


def test_no_more_than_the_largest_batch_run():
    found = run([(0.0, 100, 2), (0.0, 100, 2)], host(max_batch=1))
    first = 0.1 + 0.01 + 101e-5
    assert found["latency_s"].tolist() == pytest.approx([first, 2 * first])


def test_what_memory_could_never_hold_is_dropped_on_entry():
    found = run([(0.0, 90, 11), (0.0, 90, 10)], host(memory_bytes=200), kv_bytes=2)
    assert found["outcome"].tolist() == ["dropped", "good"]
    assert found["reason"].tolist()[0] == "larger than the KV memory"


def test_sequences_wait_while_memory_does_not_hold_them():
    """100 tokens of memory: 60 + 1 and 60 + 1 do not fit together, so the second waits for the end of the first."""
    found = run([(0.0, 60, 2), (0.0, 60, 2)], host(memory_bytes=100), kv_bytes=1)
    first = 0.06 + 0.01 + 61e-5
    assert found["latency_s"].tolist() == pytest.approx([first, 2 * first])


def test_the_one_admitted_last_is_preempted_and_recomputes_what_it_had():
    """100 tokens: 48 + 48 grow to 50 + 50 in the first decode; the next needs 102. The second leaves with 50 tokens of
    context, the first goes on alone and ends; then the second is prefilled over 50 tokens, which makes its last.
    """
    found = run([(0.0, 48, 3), (0.0, 48, 3)], host(memory_bytes=100), kv_bytes=1)
    prefilled = 0.096
    decoded = prefilled + 0.011 + 98e-5
    first = decoded + 0.01 + 50e-5
    assert found["latency_s"].tolist() == pytest.approx([first, first + 0.05])
    assert found["ttft_s"].tolist() == pytest.approx([prefilled, prefilled])
    assert found["outcome"].tolist() == ["good", "good"]


def test_heads_whose_first_token_cannot_come_in_time_are_dropped_and_only_with_early_drop():
    rows = [(0.0, 100, 1), (0.0, 100, 1)]
    found = run(rows, host(max_batch=1), chat(ttft=0.15))
    assert found["reason"].tolist()[1] == "deadline cannot be met"
    late = run(rows, host(max_batch=1), chat(ttft=0.15), early_drop=False)
    assert late["outcome"].tolist() == ["good", "late"]


def test_an_answer_is_good_only_with_both_ttft_and_tpot():
    assert run([(0.0, 100, 3)], services=chat(ttft=0.1, tpot=0.012))["outcome"].tolist() == ["good"]
    assert run([(0.0, 100, 3)], services=chat(ttft=0.1, tpot=0.010))["outcome"].tolist() == ["late"]


def test_the_way_back_counts_for_the_first_token():
    found = run([(0.0, 100, 2)], services=chat(ttft=0.105), response_s=0.01, early_drop=False).iloc[0]
    assert found["ttft_s"] == pytest.approx(0.11)
    assert found["outcome"] == "late"


def test_what_agent_and_worker_add_counts_in_every_iteration():
    plain, found = (run([(0.0, 100, 3)], iteration_overhead_s=s).iloc[0] for s in (0.0, 0.002))
    assert found["ttft_s"] == pytest.approx(plain["ttft_s"] + 0.002)
    assert found["tpot_s"] == pytest.approx(plain["tpot_s"] + 0.002)


def test_tokens_that_the_trace_does_not_state_are_128():
    found = run([(0.0, None, None)], services=chat(ttft=10, tpot=10)).iloc[0]
    assert found["ttft_s"] == pytest.approx(0.128)
    assert found["tpot_s"] == pytest.approx(0.01 + 1e-5 * (129 + 255) / 2)


def test_without_token_costs_generation_takes_the_plans_table():
    trace = RequestTrace(pd.DataFrame({"arrival_s": [0.0], "service": "chat"}))
    found = evaluate(host(), chat(), trace).requests.iloc[0]
    assert found["latency_s"] == pytest.approx(0.05)
    assert pd.isna(found["ttft_s"])


def test_a_group_shared_with_another_service_takes_turns_by_deadline():
    """While chat (TPOT 1 s) decodes, detect (due at 0.6) comes at 0.105: it goes when the decode at 0.11101 ends."""
    other = entry("detect", max_batch=1, stage_latency_s=((0.05,),))
    frame = pd.DataFrame(
        {
            "arrival_s": [0.0, 0.105],
            "service": ["chat", "detect"],
            "input_tokens": [100, None],
            "output_tokens": [3, None],
        }
    ).astype({"input_tokens": "Int64", "output_tokens": "Int64"})
    services = chat(ttft=1.0, tpot=2.0)
    found = evaluate(
        host(4, 1000, other), services, RequestTrace(frame), cluster=cluster(), profiles=profile()
    ).requests
    assert found["latency_s"].tolist() == pytest.approx([0.11101 + 0.05 + 0.01102, 0.11101 + 0.05 - 0.105])


lengths = st.tuples(st.sampled_from([0.0, 0.001, 0.03]), st.integers(1, 60), st.integers(1, 30))


@given(st.lists(lengths, min_size=1, max_size=40), st.integers(1, 6), st.sampled_from([100, 300, 5000]))
@settings(max_examples=60, deadline=None)
def test_every_sequence_ends_once_and_runs_repeat_bit_by_bit(rows, max_batch, memory_bytes):
    """Law: offered = good + late + dropped; what fits ends whatever is preempted; the same seed gives the same log."""
    clock, sent = 0.0, []
    for gap, prompt, output in rows:
        clock += gap
        sent.append((clock, prompt, output))
    one, services = host(max_batch, memory_bytes), chat(ttft=1e6, tpot=1e6)
    first, second = (run(sent, one, services, kv_bytes=1) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert set(first["outcome"]) == {"good"}
    assert (first["ttft_s"] <= first["latency_s"]).all()
