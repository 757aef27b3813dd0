from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.runtime.generation_queue import GenerationQueue, prefill_curve
from executor.runtime.iteration import Decode, IterationLimits, Prefill
from executor.runtime.protocol import GenerationFacts
from tests.evaluator.naive_parts import TokenCosts

FACTS = GenerationFacts(vocabulary=100, max_context=64, kv_bytes_per_token=1)
PROMPT = (1, 2, 3)


def queue(max_batch: int = 2, kv_tokens: int = 100) -> GenerationQueue:
    return GenerationQueue(IterationLimits(max_batch=max_batch, kv_tokens=kv_tokens), FACTS)


@given(
    st.dictionaries(st.integers(1, 500), st.floats(1e-3, 10), min_size=1, max_size=5),
    st.integers(1, 1000),
)
def test_a_prefill_takes_what_the_evaluator_says(points, tokens):
    xs, ys = sorted(map(float, points)), sorted(points.values())
    curve = prefill_curve(xs, ys)
    naive = TokenCosts(prefill=list(zip(xs, ys, strict=True)), decode_s=(1.0,), decode_token_s=0.0)
    assert curve is not None
    assert curve(tokens) == pytest.approx(naive.prefill_s(tokens), rel=1e-12)


def test_without_points_nothing_is_known():
    assert prefill_curve((), ()) is None


def test_what_is_removed_gets_no_token_and_gives_its_memory_back_once():
    held = queue()
    first, second = (held.add(PROMPT, 5, now_s=0.0) for _ in range(2))
    work = held.turn(0.0).work
    assert work == Prefill((first, second))
    held.remove(first)
    step = held.end(work, (7, 8), 1.0)
    assert step.produced == ((second, 8),)
    assert held.take_freed() == (first,)
    assert held.take_freed() == ()
    held.remove(first)
    assert held.take_freed() == ()
    assert held.turn(1.0).work == Decode((second,))
    assert held.contexts(Prefill((second,))) == ((second, (*PROMPT, 8)),)


def test_one_that_waits_is_forgotten_without_memory_to_free():
    held = queue(max_batch=1)
    first, second = (held.add(PROMPT, 2, now_s=0.0) for _ in range(2))
    work = held.turn(0.0).work
    assert work == Prefill((first,))
    held.remove(second)
    held.end(work, (7,), 1.0)
    assert (held.waiting, held.running, held.take_freed()) == (0, 1, ())
    assert held.clear() == (first,)
    assert held.is_idle
    assert held.turn(2.0).work is None


def test_the_turn_is_due_at_the_first_token_that_waits_or_a_token_after_what_runs():
    """The key of docs/evaluator.md, section 9: the smaller of the head's deadline and the last iteration plus TPOT."""
    held = queue(max_batch=1)
    assert held.key(0.5) is None
    held.add(PROMPT, 9, now_s=0.0, ttft_s=3.0)
    assert held.key(0.5) == 3.0
    work = held.turn(0.0).work
    assert work is not None
    held.end(work, (7,), 1.0)
    assert held.key(0.5) == 1.5
    held.add(PROMPT, 9, now_s=0.0, ttft_s=1.2)
    assert held.key(0.5) == 1.2


def test_lower_limits_let_what_runs_go_on():
    held = queue(max_batch=2)
    numbers = [held.add(PROMPT, 3, now_s=0.0) for _ in range(2)]
    work = held.turn(0.0).work
    assert work is not None
    held.end(work, (7, 7), 1.0)
    held.change(IterationLimits(max_batch=1, kv_tokens=100), None)
    held.add(PROMPT, 3, now_s=1.0)
    assert held.turn(1.0).work == Decode(tuple(numbers))
