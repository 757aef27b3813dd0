"""Models over several devices as the profiler sees them: stages of whole requests, and of the phases of generation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from executor.runtime.protocol import GenerationFacts
from foreplan.parallel_group import ParallelGroup
from plans.errors import InvalidInput
from profiles.group import Point, Series


class Phase:
    """A decode of two stages, the second with more layers."""

    kv_bytes = (100, 300)

    def __call__(self):
        return [1, 2]


class Model:
    name = "llama-tiny"
    stage_weight_bytes = (1000, 2000)
    generation = GenerationFacts(vocabulary=10, max_context=64, kv_bytes_per_token=4)

    def __init__(self):
        self.ran = []

    def example(self, batch):
        return {"input_ids": batch}

    def run(self, inputs):
        self.ran.append(inputs["input_ids"])

    def phase_pass(self, phase, batch, tokens):
        self.ran.append((phase, batch, tokens))
        return Phase()

    def stage_run_s(self):
        return (0.25, 0.75)


def group(pp=2, loaded=None):
    return ParallelGroup(loaded=loaded or Model(), memory=lambda run: 7, tp=1, pp=pp)


def test_each_stage_of_a_phase_holds_the_keys_and_values_of_its_layers():
    run = group().prepare(Point(batch=3, series=Series(phase="decode", input_tokens=16)))
    assert group().activation_bytes(run) == (107, 307)
    assert group().stage_s(run) == (0.25, 0.75)


def test_a_whole_request_takes_the_same_on_every_stage():
    made = group()
    run = made.prepare(Point(batch=3, series=Series()))
    assert made.activation_bytes(run) == (7, 7)
    assert made.stage_s(run) == (0.25, 0.75)
    assert made.loaded.ran == [3]


def test_without_stages_there_is_no_time_of_a_stage():
    assert group(pp=1).stage_s(lambda: None) == ()


@pytest.mark.parametrize(
    ("loaded", "series", "expected"),
    [
        (Model(), Series(phase="prefill", input_tokens=65), "at most 64 tokens"),
        (
            SimpleNamespace(name="bert"),
            Series(phase="prefill", input_tokens=8),
            "measure prefill and decode of a Llama",
        ),
        (Model(), Series(phase="whole", input_tokens=8), "whole requests"),
    ],
)
def test_what_a_model_cannot_do_is_refused(loaded, series, expected):
    with pytest.raises(InvalidInput, match=expected):
        group(loaded=loaded).prepare(Point(batch=1, series=series))
