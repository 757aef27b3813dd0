from __future__ import annotations

import pytest

from plans.errors import InvalidInput
from plans.service import GenerationService, GenerationSlo, LatencyService, LatencySlo, Variant
from profiles.document import Profile
from profiles.generation import compose_whole, token_rules, whole_parallelisms
from profiles.library import ProfileLibrary
from tests.profiles.documents import profile, row


def phases(tp: int = 1) -> Profile:
    """Prefill takes 1 ms a prompt token and sequence; a decode step 10 ms, and 1 ms per 100 tokens of context."""
    rows = [
        row(batch, 0.001 * batch * tokens, input_tokens=tokens, phase="prefill", tp=tp)
        for batch in (1, 4)
        for tokens in (100, 400)
    ]
    rows += [
        row(batch, 0.010 + tokens / 1e5, input_tokens=tokens, phase="decode", tp=tp)
        for batch in (1, 4, 8)
        for tokens in (100, 1000)
    ]
    return profile(*rows)


def test_a_whole_request_is_its_prefill_and_one_step_for_each_further_token() -> None:
    library = ProfileLibrary([phases()])
    model = library.latency("resnet-18", "cpu", 1, 1, input_tokens=200, output_tokens=101)
    assert model is not None
    assert model.batches == (1, 4)
    steps_s = sum(0.010 + (200 + step) / 1e5 for step in range(1, 101))
    assert model.at(4).mean_s == pytest.approx(0.8 + steps_s, rel=1e-3)


def test_one_token_is_the_prefill_alone() -> None:
    whole = compose_whole(phases(), 1, 1, 400, 1)
    assert {each.batch: each.latency_s.mean for each in whole.rows} == pytest.approx({1: 0.4, 4: 1.6})


def test_the_error_of_the_phases_is_that_of_the_whole() -> None:
    whole = compose_whole(phases(), 1, 1, 200, 10)
    assert whole.error_ratio is not None
    assert whole.error_ratio >= 0.02


def test_phases_alone_make_a_parallelism_only_when_both_are_there() -> None:
    rows = phases().rows
    both = [each for each in rows if each.phase == "prefill"]
    assert whole_parallelisms(profile(*rows)) == ((1, 1),)
    assert whole_parallelisms(profile(*both)) == ()
    assert whole_parallelisms(profile(row(1, 0.1, tp=2), *both)) == ((2, 1),)


def test_without_prefill_nothing_can_be_composed() -> None:
    decode = [each for each in phases().rows if each.phase == "decode"]
    with pytest.raises(InvalidInput, match="prefill"):
        compose_whole(profile(*decode), 1, 1, 100, 10)
    assert ProfileLibrary([profile(*decode)]).latency("resnet-18", "cpu", 1, 1) is None


def test_token_rules_are_the_deadlines_of_the_service_and_the_prefills_of_the_profile() -> None:
    variants = (Variant(model="resnet-18"),)
    chat = GenerationService(name="chat", slo=GenerationSlo(ttft_s=0.5, tpot_s=0.05), variants=variants)
    rules = token_rules(chat, phases(), 1, 1)
    assert rules is not None
    assert (rules.ttft_s, rules.tpot_s) == (0.5, 0.05)
    assert rules.prefill_tokens == (100.0, 400.0, 1600.0)
    assert rules.prefill_s == pytest.approx((0.1, 0.4, 1.6))
    unknown = token_rules(chat, phases(), 2, 1)
    assert unknown is not None
    assert unknown.prefill_tokens == ()
    assert token_rules(chat, None, 1, 1) is None
    whole = LatencyService(name="whole", slo=LatencySlo(deadline_s=0.5), variants=variants)
    assert token_rules(whole, phases(), 1, 1) is None
