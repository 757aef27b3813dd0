from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from dataclasses import dataclass

import numpy as np
import pytest

from executor.runtime.protocol import DevicesLost, OutOfDeviceMemory
from executor.segment import SharedSegment, place_all
from executor.worker import Worker, make_runtime, runtime_factory
from executor.worker_wire import (
    Done,
    Failed,
    FrameSplitter,
    Iterate,
    Iterated,
    Load,
    Loaded,
    Ready,
    Run,
    Stop,
    Unload,
    Unloaded,
    decode_from_worker,
    encode_to_worker,
)
from plans.errors import InvalidInput
from tests.executor.fake_runtime import FakeGenerator, FakeModel, FakeRuntime
from tests.executor.running_agent import WAIT_S
from tests.executor.scripted_runtime import ScriptedRuntime


class Agent:
    """The other end of a worker that runs in a thread of this process."""

    def __init__(self, connection, segment):
        self.connection = connection
        self.segment = segment
        self.frames = FrameSplitter()
        self.held = []

    def say(self, message):
        self.connection.sendall(encode_to_worker(message))

    def hear(self):
        while not self.held:
            data = self.connection.recv(1 << 16)
            assert data, "the worker is gone"
            self.held += [decode_from_worker(body) for body in self.frames.feed(data)]
        return self.held.pop(0)

    def ask(self, message):
        self.say(message)
        return self.hear()


class LoadsAtPriorities(ScriptedRuntime):
    """Notes the niceness of the thread of each load."""

    def __init__(self, folder):
        super().__init__(model_dir=folder)
        self.niceness = []

    def load(self, variant, max_batch, shape=(1, 1)):
        self.niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return super().load(variant, max_batch)


@contextlib.contextmanager
def worker(folder, on_gone=lambda: None, runtime=None, on_lost=lambda error: None):
    ours, theirs = socket.socketpair()
    ours.settimeout(WAIT_S)
    segment = SharedSegment.create()
    segment.grow(1 << 16)
    theirs_segment = SharedSegment(os.dup(segment.descriptor))
    ended = []
    served = Worker(theirs, theirs_segment, runtime or ScriptedRuntime(model_dir=folder), on_gone, on_lost)
    thread = threading.Thread(target=lambda: ended.append(served.serve()))
    thread.start()
    agent = Agent(ours, segment)
    try:
        ready = agent.hear()
        assert isinstance(ready, Ready)
        assert ready.process == os.getpid()
        yield agent, ended, thread
    finally:
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_S)
        for held in (ours, theirs, segment, theirs_segment):
            held.close()


def run(call, variant, values, segment):
    array = np.asarray(values, np.float32)
    places = place_all({"x": ("FP32", array.shape)}, 0)
    segment.write({"x": [array]}, places)
    return Run(call=call, variant=variant, inputs=places, output_offset_bytes=4096, output_capacity_bytes=4096)


def test_outputs_lie_where_the_agent_said(tmp_path):
    with worker(tmp_path) as (agent, _, _):
        loaded = agent.ask(Load(call=1, variant="twice", max_batch=2))
        assert isinstance(loaded, Loaded)
        assert loaded.weight_bytes == 1024
        done = agent.ask(run(2, "twice", [[1, 2, 3, 4], [5, 6, 7, 8]], agent.segment))
        assert isinstance(done, Done)
        assert (done.call, done.outputs[0].offset_bytes) == (2, 4096)
        np.testing.assert_array_equal(agent.segment.array(done.outputs[0]), [[2, 4, 6, 8], [10, 12, 14, 16]])


def test_a_batch_beyond_what_was_loaded_for_is_the_callers_fault(tmp_path):
    with worker(tmp_path) as (agent, _, _):
        agent.ask(Load(call=1, variant="twice", max_batch=1))
        answer = agent.ask(run(2, "twice", [[1, 2, 3, 4]] * 2, agent.segment))
        assert isinstance(answer, Failed)
        assert answer.invalid_input
        agent.ask(Load(call=3, variant="twice", max_batch=2))
        assert isinstance(agent.ask(run(4, "twice", [[1, 2, 3, 4]] * 2, agent.segment)), Done)


def test_a_worker_loads_its_first_model_at_low_priority_and_no_model_beside_others(tmp_path):
    runtime = LoadsAtPriorities(tmp_path)
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with worker(tmp_path, runtime=runtime) as (agent, _, _):
        agent.ask(Load(call=1, variant="twice", max_batch=1))
        agent.ask(Load(call=2, variant="twin", max_batch=1))
        agent.ask(Unload(call=3, variant="twice"))
        agent.ask(Unload(call=4, variant="twin"))
        agent.ask(Load(call=5, variant="twice", max_batch=1))
    first, beside, again = runtime.niceness
    assert first == again > beside == usual


def test_an_unloaded_variant_does_not_run(tmp_path):
    with worker(tmp_path) as (agent, _, _):
        agent.ask(Load(call=1, variant="twice", max_batch=1))
        assert agent.ask(Unload(call=2, variant="twice")) == Unloaded(call=2)
        assert isinstance(agent.ask(run(3, "twice", [[1, 2, 3, 4]], agent.segment)), Failed)


def test_what_a_model_raises_is_told_with_its_type(tmp_path):
    with worker(tmp_path) as (agent, _, _):
        agent.ask(Load(call=1, variant="raises", max_batch=1))
        assert agent.ask(run(2, "raises", [[1, 2, 3, 4]], agent.segment)) == Failed(
            call=2, problem="RuntimeError: raised on purpose"
        )
        assert agent.ask(Load(call=3, variant="no-memory", max_batch=1)) == Failed(
            call=3, problem="no-memory does not fit"
        )


class Answers(ScriptedRuntime):
    """Its model returns what it is given here, whatever it is asked."""

    def __init__(self, **outputs):
        super().__init__()
        self.outputs = outputs

    def load(self, variant, max_batch, shape=(1, 1)):
        model = super().load(variant, max_batch)
        object.__setattr__(model, "run", lambda inputs: self.outputs)
        return model


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        ({"y": np.zeros((3, 4), np.float32)}, r"'y' is float32 of shape \[3, 4\], not FP32 of shape \[2, 4\]"),
        ({"y": np.zeros((1, 4), np.float32)}, r"shape \[1, 4\], not FP32"),
        ({"y": np.zeros((2, 2), np.float32)}, r"shape \[2, 2\], not FP32"),
        ({"y": np.zeros((2, 4), np.float16)}, "float16"),
        ({"y": np.zeros((2, 4), np.complex64)}, "complex64"),
        ({"y": np.array([["text"] * 4] * 2)}, "<U4"),
        ({}, "'y' is missing"),
        ({"y": np.zeros((2, 4), np.float32), "z": np.zeros((2, 4), np.float32)}, "'z' is none of its outputs"),
    ],
)
def test_a_model_that_returns_other_than_it_says_is_at_fault_and_not_its_caller(outputs, says):
    with worker(None, runtime=Answers(**outputs)) as (agent, _, _):
        agent.ask(Load(call=1, variant="twice", max_batch=2))
        failed = agent.ask(run(2, "twice", [[1, 2, 3, 4], [5, 6, 7, 8]], agent.segment))
    assert isinstance(failed, Failed)
    assert not failed.invalid_input
    assert re.search(says, failed.problem)


def test_a_stop_comes_after_the_batches_sent_before(tmp_path):
    with worker(tmp_path) as (agent, ended, thread):
        agent.ask(Load(call=1, variant="twice", max_batch=1))
        agent.say(run(2, "twice", [[1, 2, 3, 4]], agent.segment))
        agent.say(Stop())
        assert isinstance(agent.hear(), Done)
        thread.join(WAIT_S)
        assert ended == [True]


def test_the_end_of_the_pipe_ends_the_worker(tmp_path):
    with worker(tmp_path) as (agent, ended, thread):
        agent.connection.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_S)
        assert ended == [False]


def test_the_end_of_the_pipe_is_noticed_in_the_middle_of_a_batch(tmp_path):
    gone = threading.Event()
    with worker(tmp_path, gone.set) as (agent, ended, thread):
        agent.ask(Load(call=1, variant="gated-run", max_batch=1))
        agent.say(run(2, "gated-run", [[1, 2, 3, 4]], agent.segment))
        assert not gone.is_set()
        agent.connection.shutdown(socket.SHUT_RDWR)
        assert gone.wait(WAIT_S)
        assert not ended
        (tmp_path / "run").touch()
        thread.join(WAIT_S)
        assert ended == [False]


class LosesDevices(ScriptedRuntime):
    """A runtime whose other devices are lost when the test says so."""

    def __init__(self, folder):
        super().__init__(model_dir=folder)
        self.gone = threading.Event()

    def await_loss(self):
        assert self.gone.wait(WAIT_S)
        return DevicesLost("one of two")


def test_lost_devices_are_noticed_without_a_batch(tmp_path):
    runtime, told, heard = LosesDevices(tmp_path), [], threading.Event()

    def note(error):
        told.append(str(error))
        heard.set()

    with worker(tmp_path, runtime=runtime, on_lost=note):
        assert told == []
        runtime.gone.set()
        assert heard.wait(WAIT_S)
        assert told == ["one of two"]


def test_a_load_that_comes_with_a_batch_begins_before_the_batch(tmp_path):
    with worker(tmp_path) as (agent, _, _):
        agent.ask(Load(call=1, variant="gated-run", max_batch=1))
        batch = encode_to_worker(run(2, "gated-run", [[1, 2, 3, 4]], agent.segment))
        agent.connection.sendall(batch + encode_to_worker(Load(call=3, variant="twice", max_batch=1)))
        loaded = agent.hear()
        assert isinstance(loaded, Loaded)
        assert loaded.call == 3
        (tmp_path / "run").touch()
        assert isinstance(agent.hear(), Done)


class Replaced(FakeRuntime):
    """A model that is loaded again during a batch, which sees whether it is closed under it."""

    def __init__(self):
        super().__init__()
        self.loads = 0
        self.begun, self.closed = threading.Event(), threading.Event()
        self.closed_under_batch = None

    def load(self, variant, max_batch, shape=(1, 1)):
        self.loads += 1
        if self.loads > 1:
            assert self.begun.wait(WAIT_S)
        return ReplacedModel(name=variant, max_batch=max_batch, runtime=self)


@dataclass(frozen=True, kw_only=True)
class ReplacedModel(FakeModel):
    runtime: Replaced

    def run(self, inputs):
        self.runtime.begun.set()
        self.runtime.closed_under_batch = self.runtime.closed.wait(0.2)
        return super().run(inputs)

    def close(self):
        self.runtime.closed.set()


def test_a_model_that_is_replaced_is_closed_after_the_batch_that_has_it(tmp_path):
    runtime = Replaced()
    with worker(tmp_path, runtime=runtime) as (agent, _, _):
        agent.ask(Load(call=1, variant="fake-double", max_batch=1))
        batch = encode_to_worker(run(2, "fake-double", [[1, 2, 3, 4]], agent.segment))
        again = Load(call=3, variant="fake-double", max_batch=2)
        agent.connection.sendall(batch + encode_to_worker(again))
        assert {type(agent.hear()), type(agent.hear())} == {Done, Loaded}
        assert runtime.closed_under_batch is False
        assert runtime.closed.wait(WAIT_S)


class CountsInShapes(FakeRuntime):
    """Models that count on and note that they were closed, by shape; ``full`` has no memory for sequences."""

    def __init__(self, full=()):
        super().__init__(devices=("cpu", "cpu"))
        self.full = full
        self.closed = []

    def load(self, variant, max_batch, shape=(1, 1)):
        generation = super().load("fake-count", max_batch, shape).generation
        return CountsInShape(name=variant, max_batch=max_batch, generation=generation, runtime=self, shape=shape)


@dataclass(frozen=True, kw_only=True)
class CountsInShape(FakeGenerator):
    runtime: CountsInShapes
    shape: tuple[int, int]

    def sequences(self, kv_tokens):
        if self.shape in self.runtime.full:
            raise OutOfDeviceMemory("no memory for sequences")
        return super().sequences(kv_tokens)

    def close(self):
        self.runtime.closed.append(self.shape)


def load_in(agent, call, shape):
    return agent.ask(Load(call=call, variant="fake-count", max_batch=2, shape=shape, kv_bytes=500))


def iterate(agent, call, freed=(), prefill=(), decode=()):
    answer = agent.ask(
        Iterate(call=call, variant="fake-count", kv_tokens=50, freed=freed, prefill=prefill, decode=decode)
    )
    assert isinstance(answer, Iterated)
    return answer.tokens


def test_a_model_that_generates_changes_its_shape_and_its_sequences_end_where_they_began(tmp_path):
    runtime = CountsInShapes()
    with worker(tmp_path, runtime=runtime) as (agent, _, _):
        assert isinstance(load_in(agent, 1, (2, 1)), Loaded)
        assert iterate(agent, 2, prefill=((7, (10,)),)) == (11,)
        load_in(agent, 3, (2, 1))
        load_in(agent, 4, (1, 2))
        assert iterate(agent, 5, prefill=((8, (20,)),)) == (21,)
        assert iterate(agent, 6, decode=(7, 8)) == (12, 22)
        assert runtime.closed == []
        assert iterate(agent, 7, freed=(7,), decode=(8,)) == (23,)
        assert runtime.closed == [(2, 1)]
        assert isinstance(agent.ask(Unload(call=8, variant="fake-count")), Unloaded)
        assert runtime.closed == [(2, 1), (1, 2)]


def test_a_model_that_generates_takes_larger_batches_of_whole_requests_without_another_load(tmp_path):
    with worker(tmp_path, runtime=FakeRuntime()) as (agent, _, _):
        for call, max_batch in ((1, 1), (2, 2), (3, 1)):
            load = Load(call=call, variant="fake-count", max_batch=max_batch, kv_bytes=500)
            assert isinstance(agent.ask(load), Loaded)
        assert isinstance(agent.ask(run(4, "fake-count", np.ones((2, 4)), agent.segment)), Done)
        assert isinstance(agent.ask(run(5, "fake-count", np.ones((3, 4)), agent.segment)), Failed)


def test_a_model_without_memory_for_sequences_is_closed_and_what_was_loaded_before_goes_on(tmp_path):
    runtime = CountsInShapes(full=[(1, 2)])
    with worker(tmp_path, runtime=runtime) as (agent, _, _):
        load_in(agent, 1, (2, 1))
        iterate(agent, 2, prefill=((7, (10,)),))
        failed = load_in(agent, 3, (1, 2))
        assert isinstance(failed, Failed)
        assert "no memory for sequences" in failed.problem
        assert runtime.closed == [(1, 2)]
        assert iterate(agent, 4, decode=(7,)) == (12,)


@pytest.mark.parametrize("path", ["", "os", "os:", ":path", "os:nothing", "no.module:x", "os:name"])
def test_a_path_that_names_no_factory_is_refused(path):
    with pytest.raises(InvalidInput, match="module:factory"):
        runtime_factory(path)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("os:getcwd", "expected a factory that takes devices, dtype"),
        ("json:loads", "missing a required argument: 's'"),
        ("types:SimpleNamespace", "which makes SimpleNamespace, expected a factory of runtimes"),
    ],
)
def test_a_factory_of_something_else_is_refused(path, says):
    with pytest.raises(InvalidInput, match=says):
        make_runtime(path, devices=("cpu",), dtype="fp32")


def test_a_factory_makes_a_runtime_of_the_options():
    made = make_runtime("tests.executor.fake_runtime:FakeRuntime", devices=("cpu",), dtype="fp16")
    assert isinstance(made, FakeRuntime)
    assert made.dtype == "fp16"
