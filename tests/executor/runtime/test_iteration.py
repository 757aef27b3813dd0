from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.runtime.iteration import Decode, IterationLimits, IterationScheduler, Prefill, Turn
from plans.errors import InvalidInput
from tests.evaluator.test_generation import chat, host, run

PREFILL_TOKEN_S = 1e-3


def decode_s(sequences: int, context: int) -> float:
    return 0.009 + 1e-3 * sequences + 1e-5 * context


def scheduler(max_batch: int = 4, kv_tokens: int | None = None, max_prefill_tokens: int = 8192, **chosen):
    limits = IterationLimits(max_batch=max_batch, kv_tokens=kv_tokens, max_prefill_tokens=max_prefill_tokens)
    return IterationScheduler(limits, **chosen)


def test_every_limit_below_one_is_named_at_once():
    with pytest.raises(InvalidInput) as caught:
        IterationLimits(max_batch=0, kv_tokens=0, max_prefill_tokens=0)
    assert {fault.field for fault in caught.value.faults} == {"max_batch", "kv_tokens", "max_prefill_tokens"}


def test_nothing_to_do_is_a_turn_without_work():
    assert scheduler().turn(0.0) == Turn()


def test_the_least_key_goes_first_and_equal_keys_in_the_order_of_entry():
    core = scheduler(max_batch=3)
    for number, key in enumerate([2.0, 1.0, 1.0, 0.5]):
        core.add(number, 5, 2, key=key)
    assert core.turn(0.0).work == Prefill((3, 1, 2))
    assert core.waiting == (0,)


def test_a_stopped_sequence_ends_before_it_has_all_its_tokens():
    core = scheduler()
    core.add(0, 5, 10, key=0.0)
    core.add(1, 5, 10, key=0.0)
    work = core.turn(0.0).work
    assert core.end(work, stopped={1}) == (1,)
    assert core.turn(0.0).work == Decode((0,))


def test_a_sequence_whose_first_token_would_be_late_is_dropped_and_one_that_has_produced_is_not():
    core = scheduler(kv_tokens=100, prefill_s=lambda tokens: tokens * PREFILL_TOKEN_S)
    core.add(0, 48, 3, key=0.1, due_s=0.1)
    core.add(1, 48, 3, key=0.1, due_s=0.1)
    core.add(2, 48, 3, key=0.2, due_s=0.2)
    core.end(core.turn(0.0).work)
    core.end(core.turn(0.1).work)
    late = core.turn(0.5)  # memory is full: 1 is preempted only after 2 was given up
    assert (late.dropped, late.preempted, late.work) == ((2,), (1,), Decode((0,)))
    assert core.end(late.work) == (0,)
    assert core.turn(9.0) == Turn(work=Prefill((1,)))


requests = st.lists(
    st.tuples(st.floats(0, 0.5).map(lambda at: round(at, 3)), st.integers(1, 60), st.integers(1, 12)),
    min_size=1,
    max_size=12,
).map(sorted)


def simulate(rows, core: IterationScheduler, kv_tokens: int, ttft_s: float) -> list[tuple[float, float] | None]:
    """Run ``rows`` with the evaluator's costs on a clock of our own; (TTFT, latency) of each, None where dropped."""
    now = 0.0
    todo = list(enumerate(rows))
    lengths, first, last = {}, {}, {}
    while True:
        while todo and todo[0][1][0] <= now:
            number, (at, prompt, output) = todo.pop(0)
            if core.can_ever_hold(prompt, output):
                core.add(number, prompt, output, key=at + ttft_s, due_s=at + ttft_s)
                lengths[number] = prompt
        turn = core.turn(now)
        for number in turn.dropped:
            del lengths[number]
        if turn.work is None:
            if not todo:
                break
            now = todo[0][1][0]
            continue
        served = turn.work.sequences
        context = sum(lengths[number] for number in served)
        is_prefill = isinstance(turn.work, Prefill)
        assert is_prefill or context + len(served) <= kv_tokens or len(served) == 1
        now += context * PREFILL_TOKEN_S if is_prefill else decode_s(len(served), context)
        for number in served:
            lengths[number] += 1
            first.setdefault(number, now)
        last |= dict.fromkeys(core.end(turn.work), now)
    return [(first[i] - rows[i][0], last[i] - rows[i][0]) if i in last else None for i in range(len(rows))]


@settings(max_examples=40)
@given(
    rows=requests, max_batch=st.integers(1, 4), kv_tokens=st.integers(40, 200), chunk=st.sampled_from([30, 80, 8192])
)
def test_decisions_are_those_of_the_evaluator(rows, max_batch, kv_tokens, chunk):
    """With the same costs every request gets its tokens at the same times in `evaluator.evaluate`."""
    core = scheduler(max_batch, kv_tokens, chunk, prefill_s=lambda tokens: tokens * PREFILL_TOKEN_S)
    ours = simulate(rows, core, kv_tokens, ttft_s=0.2)
    table = run(
        rows,
        host(max_batch=max_batch, memory_bytes=kv_tokens),
        chat(ttft=0.2),
        kv_bytes=1,
        max_prefill_tokens=chunk,
    )
    for mine, (_, theirs) in zip(ours, table.iterrows(), strict=True):
        if mine is None:
            assert theirs["outcome"] == "dropped"
        else:
            assert pd.notna(theirs["ttft_s"])
            assert mine == pytest.approx((theirs["ttft_s"], theirs["latency_s"]), abs=1e-9)


@given(
    rows=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 10)), max_size=15),
    max_batch=st.integers(1, 5),
    kv_tokens=st.integers(50, 120),
)
def test_everyone_gets_all_their_tokens_and_memory_is_never_exceeded(rows, max_batch, kv_tokens):
    core = scheduler(max_batch, kv_tokens)
    for number, (prompt, output) in enumerate(rows):
        core.add(number, prompt, output, key=0.0)
    produced = dict.fromkeys(range(len(rows)), 0)
    ended = []
    for _ in range(10_000):
        turn = core.turn(0.0)
        if turn.work is None:
            break
        assert len(core.running) <= max_batch
        assert core.context_tokens + len(core.running) <= kv_tokens
        for number in turn.work.sequences:
            produced[number] += 1
        ended += core.end(turn.work)
    assert sorted(ended) == list(range(len(rows)))
    assert produced == {number: output for number, (_, output) in enumerate(rows)}
