"""Sequences go on where they began while their model is loaded anew."""

from __future__ import annotations

import pytest

from executor.runtime.protocol import GenerationFacts, InvalidTensor
from executor.runtime.successive import SuccessiveSequences


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
