from __future__ import annotations

import pytest

from evaluator.token_costs import token_costs, token_costs_of
from plans import Services
from profiles import Profile, ProfileLibrary
from tests.plans.strategies import cluster, entry, group


def row(phase, batch, input_tokens, mean, **fields):
    return {
        "phase": phase,
        "batch": batch,
        "input_tokens": input_tokens,
        "latency_s": {"mean": mean},
        "stage_latency_s": [mean],
        "weight_bytes": [60],
        "peak_bytes": [100],
        **fields,
    }


def profile(*rows, **fields):
    return Profile.model_validate(
        {"model": "chat-model", "gpu_type": "tiny", "source": "measured", "rows": list(rows), **fields}
    )


def costs(*rows, max_batch=4, **fields):
    one = entry("chat", max_batch=max_batch, stage_latency_s=((0.1,),) * max_batch)
    return token_costs(profile(*rows, **fields), group("node-0", (0,), [one]), one, max_batch)


DECODE = row("decode", 1, 100, 0.01)


def test_prefill_points_are_totals_of_tokens_and_never_fall():
    """200 tokens take 0.3 s on average of two rows, less than 100 do: all three pool to 1.1 / 3 s."""
    found = costs(
        row("prefill", 1, 200, 0.2), row("prefill", 2, 100, 0.4), row("prefill", 1, 100, 0.5), row("decode", 1, 9, 0.01)
    )
    assert found.prefill_tokens == (100, 200)
    assert found.prefill_s == pytest.approx((1.1 / 3, 1.1 / 3))


def test_decode_is_fitted_with_one_slope_and_an_intercept_per_batch():
    rows = [row("decode", b, c, 0.01 * b + 1e-5 * b * c) for b in (1, 3) for c in (100, 300)]
    found = costs(row("prefill", 1, 100, 0.1), *rows, max_batch=5)
    assert found.decode_token_s == pytest.approx(1e-5)
    assert found.decode_s == pytest.approx((0.01, 0.02, 0.03, 0.04, 0.05))


def test_a_single_context_tells_no_slope_and_a_steep_one_no_negative_intercept():
    assert costs(row("prefill", 1, 100, 0.1), DECODE).decode_token_s == 0
    steep = costs(row("prefill", 1, 100, 0.1), row("decode", 1, 100, 0.01), row("decode", 1, 200, 0.04))
    assert steep.decode_s[0] == 0
    assert steep.decode_token_s == pytest.approx(0.025 / 150)


def test_the_lowest_concurrency_counts():
    found = costs(row("prefill", 1, 100, 0.1), row("prefill", 1, 100, 0.9, concurrency=2), DECODE)
    assert found.prefill_s == (0.1,)


def test_kv_memory_is_what_the_plan_sets_aside_beyond_the_weights():
    """memory 100, weights 60: 40 bytes hold 13 tokens of 3 bytes."""
    rows = row("prefill", 1, 100, 0.1), DECODE
    assert costs(*rows, kv_bytes_per_token=3).kv_limit_tokens == 13
    assert costs(*rows).kv_limit_tokens is None


def test_without_rows_of_both_phases_there_are_no_token_costs():
    assert costs(DECODE) is None
    assert costs(row("prefill", 1, 100, 0.1)) is None
    assert costs(row("prefill", 1, None, 0.1), DECODE) is None
    assert costs(row("prefill", 1, 100, 0.1, tp=2), DECODE) is None


def test_only_generation_has_token_costs_and_only_with_cluster_and_profiles():
    def services(kind, slo):
        return Services.model_validate(
            {"services": [{"name": "chat", "class": kind, "slo": slo, "variants": [{"model": "chat-model"}]}]}
        )

    one = entry("chat")
    where = group("node-0", (0,), [one])
    library = ProfileLibrary([profile(row("prefill", 1, 100, 0.1), DECODE)])
    chat = services("generation", {"ttft": 1, "tpot": 1})
    assert token_costs_of(where, one, chat, cluster(), library) is not None
    assert token_costs_of(where, one, chat, None, library) is None
    assert token_costs_of(where, one, chat, cluster(), None) is None
    assert token_costs_of(where, one, services("latency", {"deadline": 1}), cluster(), library) is None
    other = entry("chat", variant="another")
    assert token_costs_of(group("node-0", (0,), [other]), other, chat, cluster(), library) is None
