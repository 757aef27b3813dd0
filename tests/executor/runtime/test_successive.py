"""Sequences go on where they began while their model is loaded anew."""

from __future__ import annotations

import pytest

from executor.runtime.parallel import ParallelTorchRuntime
from executor.runtime.protocol import GenerationFacts, InvalidTensor
from executor.runtime.successive import SuccessiveSequences
from executor.runtime.torch_runtime import TorchRuntime


class Counting:
    """Counts on from the last token, and knows what it holds."""

    facts = GenerationFacts(vocabulary=100, max_context=64, kv_bytes_per_token=1)

    def __init__(self):
        self.last = {}
        self.kv_tokens = 0
        self.closed = 0

    def hold(self, kv_tokens):
        self.kv_tokens = max(self.kv_tokens, kv_tokens)

    def free(self, numbers):
        for number in numbers:
            self.last.pop(number, None)

    def prefill(self, contexts):
        self.last |= {number: tokens[-1] + 1 for number, tokens in contexts}
        return [self.last[number] for number, _ in contexts]

    def decode(self, numbers):
        if not self.last.keys() >= set(numbers):
            raise InvalidTensor.of("sequences that were prefilled", field="decode", found=str(numbers))
        self.last |= {number: self.last[number] + 1 for number in numbers}
        return [self.last[number] for number in numbers]

    def close(self):
        self.closed += 1


@pytest.fixture
def old():
    return Counting()


@pytest.fixture
def new():
    return Counting()


def test_what_began_before_goes_on_there_and_the_rest_on_the_new_one_in_the_order_asked(old, new):
    sequences = SuccessiveSequences(old)
    assert sequences.prefill([(1, (10,)), (2, (20,))]) == [11, 21]
    sequences.succeed(new, old.close)
    sequences.hold(50)
    assert (old.kv_tokens, new.kv_tokens) == (0, 50)
    assert sequences.prefill([(3, (30,))]) == [31]
    assert sequences.decode([2, 3, 1]) == [22, 32, 12]
    assert (old.last.keys(), new.last.keys()) == ({1, 2}, {3})
    with pytest.raises(InvalidTensor):
        sequences.decode([4])


@pytest.mark.parametrize("parallel", [False, True], ids=["one process", "two ranks"])
def test_what_finds_no_memory_any_more_where_it_began_is_read_again_by_the_new_one(parallel):
    """Memory grows with the new load, and with it what may run together: 20 tokens do not hold these two any more."""
    prompts = [(number, [(7 * place + number) % 1024 for place in range(8)]) for number in (1, 2)]
    alone = TorchRuntime().load("llama-tiny", 2).sequences(100)
    wanted = [alone.prefill(prompts), *(alone.decode([1, 2]) for _ in range(8))]
    runtime = ParallelTorchRuntime(["cpu", "cpu"]) if parallel else TorchRuntime()
    shapes = [((1, 2),), ((2, 1),)] if parallel else [(), ()]
    before, after = (runtime.load("llama-tiny", 2, *shape) for shape in shapes)
    closed = []
    sequences = SuccessiveSequences(before.sequences(20))
    found = [sequences.prefill(prompts)]
    sequences.succeed(after.sequences(100), lambda: closed.append(True))
    sequences.hold(100)
    found += [sequences.decode([1, 2]) for _ in range(8)]
    assert found == wanted
    assert closed == []  # sequence 1 has room where it began
    sequences.free([1])
    assert closed == [True]
    assert sequences.decode([2]) == alone.decode([2])
    if parallel:
        runtime.close()


def test_the_model_before_is_closed_once_when_its_last_sequence_has_ended(old, new):
    sequences = SuccessiveSequences(old)
    sequences.prefill([(1, (10,)), (2, (20,))])
    sequences.succeed(new, old.close)
    sequences.free([1, 7])
    assert old.closed == 0
    sequences.free([2])
    sequences.free([2])
    assert (old.closed, old.last) == (1, {})


def test_a_sequence_that_lost_its_memory_begins_again_on_the_new_one(old, new):
    sequences = SuccessiveSequences(old)
    sequences.prefill([(1, (10,))])
    sequences.succeed(new, old.close)
    sequences.free([1])
    assert sequences.prefill([(1, (10, 11))]) == [12]
    assert sequences.decode([1]) == [13]
    assert old.closed == 1


def test_without_sequences_the_model_before_is_closed_at_once(old, new):
    SuccessiveSequences(old).succeed(new, old.close)
    assert (old.closed, new.closed) == (1, 0)


def test_several_changes_in_a_row_keep_each_sequence_where_it_is(old, new):
    third = Counting()
    sequences = SuccessiveSequences(old)
    sequences.prefill([(1, (10,))])
    sequences.succeed(new, old.close)
    sequences.prefill([(2, (20,))])
    sequences.succeed(third, new.close)
    sequences.prefill([(3, (30,))])
    assert sequences.decode([1, 2, 3]) == [12, 22, 32]
    sequences.free([2])
    assert (old.closed, new.closed, third.closed) == (0, 1, 0)
    sequences.close()
    assert (old.closed, new.closed, third.closed) == (1, 1, 0)
