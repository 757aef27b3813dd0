from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor import exc

from executor.runtime import acceleration
from executor.runtime.group_runtime import TorchGroupRuntime
from executor.runtime.torch_runtime import TorchRuntime
from plans.errors import InvalidInput


def test_cuda_graphs_need_a_cuda_device():
    with pytest.raises(InvalidInput, match="device cpu, expected a CUDA device"):
        TorchRuntime(cuda_graphs=True)


def test_compiling_needs_a_compiler_and_says_so(monkeypatch):
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(InvalidInput, match="no C\\+\\+ compiler on this machine"):
        TorchRuntime(compiled=True)


def test_a_compiler_that_is_there_is_taken(monkeypatch):
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "c++")
    assert list(acceleration.acceleration_faults("cpu", compiled=True, cuda_graphs=False)) == []


def test_a_model_that_torch_cannot_compile_is_named(monkeypatch):
    def broken(module):
        def run(**inputs):
            raise exc.InductorError(RuntimeError("no such operation"), None)

        return run

    monkeypatch.setattr(torch, "compile", broken)
    run = acceleration.compiled_module(torch.nn.Identity(), "odd-model")
    with pytest.raises(InvalidInput, match=r"odd-model.*compile.*no such operation"):
        run(input=torch.zeros(1))


def test_a_group_of_several_devices_takes_no_acceleration():
    with pytest.raises(InvalidInput, match="2 devices"):
        TorchGroupRuntime(("cpu", "cpu"), compiled=True)


def test_what_is_compiled_is_what_runs(monkeypatch):
    """Compiling takes a minute, so the compiler is replaced here; a slow test compiles."""
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "c++")
    calls = []

    def compiled(module):
        def run(**inputs):
            calls.append(sorted(inputs))
            return module(**inputs)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    model = TorchGroupRuntime(compiled=True).load("bert-tiny-16", 2)
    model.run(model.example(2))
    assert calls == [["input_ids"]] * 2  # the first inference and this one


@pytest.mark.slow
def test_a_compiled_model_answers_as_the_plain_one():
    plain, compiled = (TorchRuntime(compiled=flag).load("bert-tiny-16", 2) for flag in (False, True))
    for batch in (1, 2):
        expected = plain.run(plain.example(batch))["logits"]
        np.testing.assert_allclose(compiled.run(compiled.example(batch))["logits"], expected, rtol=1e-4, atol=1e-5)
