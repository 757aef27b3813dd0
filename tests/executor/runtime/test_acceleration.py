from __future__ import annotations

import contextlib
from types import SimpleNamespace

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


class FakeCuda:
    """Stands for CUDA's graphs on the CPU: a replay runs again what was recorded, into the same answer."""

    def __init__(self, monkeypatch, run, fails=None):
        self.recorded, self.pools, self.run, self.fails = 0, [], run, fails
        self.recording = False
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextlib.contextmanager
    def graph(self, graph, *, pool, capture_error_mode):
        self.pools.append(pool)
        self.recording, self.recorded = True, self.recorded + 1
        yield
        self.recording = False
        fixed, answer = self.last
        graph.replay = lambda: answer.copy_(self.run(fixed))

    def __call__(self, **inputs):
        if self.recording and self.fails is not None:
            raise self.fails
        self.last = inputs["x"], self.run(inputs["x"])
        return self.last[1]


def test_a_shape_is_recorded_once_and_replayed_on_what_is_given_each_time(monkeypatch):
    cuda = FakeCuda(monkeypatch, lambda x: 2 * x)
    graphed = acceleration.GraphedModule(cuda, torch.device("cuda"), "m")
    for batch, value in ((2, 1.0), (4, 2.0), (2, 3.0), (4, 4.0)):
        given = torch.full((batch,), value)
        torch.testing.assert_close(graphed(x=given), 2 * given)
        given.fill_(-1)  # what was given is not what was recorded
    assert cuda.recorded == 2
    assert len(set(map(id, cuda.pools))) == 1
    graphed.forget()
    graphed(x=torch.ones(2))
    assert cuda.recorded == 3
    assert cuda.pools[-1] is not cuda.pools[0]


def test_a_model_that_cannot_be_recorded_is_named_and_a_full_device_stays_one(monkeypatch):
    cuda = FakeCuda(
        monkeypatch, lambda x: x, fails=RuntimeError("operation not permitted when stream is capturing\nmore")
    )
    graphed = acceleration.GraphedModule(cuda, torch.device("cuda"), "odd-model")
    with pytest.raises(
        InvalidInput, match=r"odd-model: cuda_graphs: found operation not permitted.*leave CUDA graphs off"
    ):
        graphed(x=torch.ones(1))
    cuda.fails = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError):
        graphed(x=torch.ones(1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, when it imports inductor
def test_a_compiled_model_answers_as_the_plain_one():
    plain, compiled = (TorchRuntime(compiled=flag).load("bert-tiny-16", 2) for flag in (False, True))
    for batch in (1, 2):
        expected = plain.run(plain.example(batch))["logits"]
        np.testing.assert_allclose(compiled.run(compiled.example(batch))["logits"], expected, rtol=1e-4, atol=1e-5)
