"""Models over several devices: tensor parallel within a stage, pipeline parallel over stages.

One process per device. The process that uses `ParallelTorchRuntime` is rank 0; it starts the others
(``python -m executor.runtime.rank``) and tells them through their standard input what to load and run, so that they end
when it does. Activations travel over torch.distributed: gloo between CPUs, NCCL between CUDA devices. Every rank builds
the whole model from the same seed or files, and keeps its part.

Ranks are numbered stage by stage: rank ``stage * tp + k`` is shard k of a stage.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from executor.runtime.generation import can_generate
from executor.runtime.mesh import World, receive
from executor.runtime.parallel_generation import Lead, ParallelPass, ParallelSequences
from executor.runtime.protocol import DevicesLost, GenerationFacts, TensorSpec, batch_of
from executor.runtime.stage_model import Cut, StageModel, cut
from executor.runtime.torch_runtime import TorchRuntime, check_tokens, random_inputs, to_tensor
from plans.errors import InvalidInput

__all__ = ["ParallelGeneratingModel", "ParallelModel", "ParallelTorchRuntime"]


class ParallelTorchRuntime:
    """The torch runtime over several devices of one machine; see `executor.runtime.protocol.GroupRuntime`.

    Args:
        devices: One per rank: ``cpu`` again and again, or CUDA devices.
        dtype: As for `TorchRuntime`, and so the following.
        threads: Threads of each rank.
        model_dir: Folder of local models.
        seed: Of random weights.

    Raises:
        InvalidInput: An argument is wrong.
        DevicesLost: A rank ended during its start.
    """

    def __init__(
        self,
        devices: Sequence[str],
        dtype: str = "fp32",
        threads: int = 1,
        model_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        self.torch_runtime = TorchRuntime(devices[0], dtype, threads, model_dir, seed)
        torch.set_num_threads(threads)
        self.world = World(rank=0, size=len(devices), device=devices[0])
        self._ranks = [
            _start_rank(rank, device, self.world, dtype, threads, model_dir, seed)
            for rank, device in enumerate(devices[1:], start=1)
        ]
        self._turns = threading.Lock()
        self._expected: SimpleQueue[_Expected | None] = SimpleQueue()
        self._await_ranks()
        self.world.join()
        self._receiver = threading.Thread(target=self._receive, name="outputs", daemon=True)
        self._receiver.start()

    def _await_ranks(self) -> None:
        """Return when every rank is about to join; to wait for one that has ended would last for ever."""
        while absent := self.world.absent:
            ended = [rank for rank in absent if self._ranks[rank - 1].poll() is not None]
            if ended:
                self._end_ranks()
                problem = (
                    f"rank {ended[0]} ended with exit code {self._ranks[ended[0] - 1].returncode} during its start"
                )
                raise DevicesLost(f"{problem}; what it wrote to stderr says why")
            time.sleep(_LOOK_S)

    def await_loss(self) -> DevicesLost:
        """Wait until a rank ends, whatever runs or does not, and return that; see `GroupRuntime`.

        NCCL, which moves tensors between the devices of one machine without connections, would wait for it for ever.
        """
        pipes = select.poll()
        for process in self._ranks:
            assert process.stdin is not None
            pipes.register(process.stdin, 0)  # an error is told in any case: that nobody reads any more
        pipes.poll()
        return DevicesLost("the process of another device of the group ended")

    def names(self) -> tuple[str, ...]:
        """Names that `load` knows, sorted."""
        return self.torch_runtime.names()

    def load(self, variant: str, max_batch: int, shape: tuple[int, int]) -> ParallelModel:
        """Load ``variant`` on every rank and run it once.

        Raises:
            UnknownVariant: There is no such model.
            InvalidInput: It cannot be cut this way, or ``max_batch`` is below 1.
            OutOfDeviceMemory: A device cannot hold its part of the weights.
            DevicesLost: Another rank ended.
        """
        tp, pp = shape
        if max_batch < 1:
            raise InvalidInput.of("at least 1", where=variant, field="max_batch", found=max_batch)
        if tp * pp != self.world.size or min(tp, pp) < 1:
            found = f"tp {tp} x pp {pp}"
            raise InvalidInput.of(f"tp x pp = {self.world.size} devices", where=variant, field="shape", found=found)
        number, start_s = next(_NUMBERS), time.perf_counter()
        with self.turn() as tell:
            tell(do="build", model=number, variant=variant)  # meanwhile: other models go on running
        try:
            whole = cut(self.torch_runtime, variant, tp, pp)
        except BaseException:
            with self.turn() as tell:
                tell(do="unload", model=number)
            raise
        kind = ParallelGeneratingModel if can_generate(whole.module) else ParallelModel
        return kind(self, number, whole, variant, max_batch, tp, pp, start_s=start_s)

    @contextlib.contextmanager
    def turn(self) -> Iterator[Callable[..., None]]:
        """Let one thread at a time tell the ranks what to do and do its own part; give it the way to tell them.

        What fails in the middle leaves the ranks out of step: the group is lost.
        """
        with self._turns, self.world.here():
            try:
                yield self._tell
            except (RuntimeError, OSError) as error:
                raise DevicesLost(f"a rank ended, or failed in the middle of a batch: {error}") from error

    def expect(self, outputs: Sequence[str], rank: int) -> Future[dict[str, NDArray[Any]]]:
        """Return the outputs that ``rank`` will send next; called in a turn, so that they come in that order.

        They are sent out of host memory.
        """
        answer: Future[dict[str, NDArray[Any]]] = Future()
        self._expected.put(_Expected(answer, tuple(outputs), rank))
        return answer

    def close(self) -> None:
        """End the other ranks."""
        self._expected.put(None)
        self._receiver.join(timeout=5)
        self._end_ranks()
        dist.destroy_process_group()

    def _end_ranks(self) -> None:
        for process in self._ranks:
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended already
                process.stdin.close()
        for process in self._ranks:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _tell(self, **command: Any) -> None:
        line = (json.dumps(command) + "\n").encode()
        for process in self._ranks:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()

    def _receive(self) -> None:
        while (expected := self._expected.get()) is not None:
            try:
                outputs = {name: receive(_HOST, expected.rank) for name in expected.outputs}
            except RuntimeError as error:
                expected.answer.set_exception(DevicesLost(f"rank {expected.rank} ended: {error}"))
            else:
                expected.answer.set_result(_arrays(outputs))


@dataclass(frozen=True, slots=True)
class _Expected:
    answer: Future[dict[str, NDArray[Any]]]
    outputs: tuple[str, ...]
    rank: int


class ParallelModel:
    """A model over the ranks, made by `ParallelTorchRuntime.load`; see `executor.runtime.protocol.PipelinedModel`.

    Attributes:
        stage_weight_bytes: Bytes of weights on each GPU of each stage, shape (pp,).
    """

    def __init__(
        self,
        runtime: ParallelTorchRuntime,
        number: int,
        whole: Cut,
        name: str,
        max_batch: int,
        tp: int,
        pp: int,
        *,
        start_s: float,
    ) -> None:
        self.name = name
        self.max_batch = max_batch
        self._runtime = runtime
        self._number = number
        self.inputs = whole.inputs
        self._wanted = whole.wanted
        self._vocabulary = whole.vocabulary
        with runtime.turn() as tell:
            tell(do="load", model=self._number, shape=[tp, pp], edges=whole.edges)
            self._mesh = runtime.world.mesh(tp, pp)
            self._stage = StageModel(whole, self._mesh, name)
            self.stage_weight_bytes = tuple(map(int, self._mesh.gathered(self._stage.weight_bytes)))
        self.load_s = time.perf_counter() - start_s
        start = time.perf_counter()
        first = self.run(self.example(1))
        self.first_inference_s = time.perf_counter() - start
        self.outputs = tuple(TensorSpec(key, "FP32", array.shape[1:]) for key, array in first.items())
        if self._mesh.device.type == "cuda" and max_batch > 1:
            self.run(self.example(max_batch))

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and buffers over all devices."""
        return sum(self.stage_weight_bytes) * self._mesh.tp

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one batch from start to end.

        Raises:
            InvalidTensor: The inputs do not fit; all faults.
            DevicesLost: A rank ended.
        """
        return self.submit(inputs).result()

    def submit(self, inputs: Mapping[str, NDArray[Any]]) -> Future[dict[str, NDArray[Any]]]:
        """Start one batch and return when the first stage is free; the future holds its outputs.

        Raises:
            InvalidTensor: The inputs do not fit; all faults.
            DevicesLost: A rank ended.
        """
        batch_of(inputs, self.inputs, max_batch=self.max_batch, where=self.name)
        check_tokens(self.name, self.inputs, self._vocabulary, inputs)
        tensor = to_tensor(inputs[self.inputs[0].name], self._mesh.device, self._runtime.torch_runtime.dtype)
        with self._runtime.turn() as tell:
            tell(do="run", model=self._number)
            if self._mesh.pp > 1:
                answer = self._runtime.expect(self._wanted, (self._mesh.pp - 1) * self._mesh.tp)
                self._stage.step(tensor)
            else:
                answer = Future()
                answer.set_result(_arrays(self._stage.step(tensor)))
        return answer

    def stage_run_s(self) -> tuple[float, ...]:
        """Return the seconds that each stage computed for the last batch, shape (pp,); nothing else may run."""
        with self._runtime.turn() as tell:
            tell(do="times", model=self._number)
            return self._stage.gather_times()

    def example(self, batch: int, seed: int = 0) -> dict[str, NDArray[Any]]:
        """Return valid random inputs for ``batch`` items; the same seed gives the same values."""
        return random_inputs(self.inputs, self._vocabulary, batch, seed)

    def close(self) -> None:
        """Free the model on every rank, after the batches before."""
        with self._runtime.turn() as tell:
            tell(do="unload", model=self._number)


class ParallelGeneratingModel(ParallelModel):
    """A Llama over several devices: it answers whole requests, and generates."""

    @property
    def generation(self) -> GenerationFacts:
        """What it takes; its key-value memory is counted over all devices."""
        torch_runtime = self._runtime.torch_runtime
        return self._stage.facts(from_files=torch_runtime.reads_files(self.name))

    def sequences(self, kv_tokens: int) -> ParallelSequences:
        """Return what runs sequences, with key-value memory for ``kv_tokens`` tokens.

        Raises:
            OutOfDeviceMemory: A device cannot hold so many of its heads and layers.
            InvalidInput: ``kv_tokens`` is below 1.
            DevicesLost: A rank ended.
        """
        if kv_tokens < 1:
            raise InvalidInput.of("at least 1", where=self.name, field="kv_tokens", found=kv_tokens)
        with self._runtime.turn() as tell:
            tell(do="sequences", model=self._number, kv_tokens=kv_tokens, name=self.name)
            own = self._stage.sequences(kv_tokens, self.generation, self.name)
        return ParallelSequences(own, self._lead())

    def widen(self, max_batch: int) -> None:
        """Take batches of up to ``max_batch``; see `executor.runtime.protocol.GeneratesTokens`."""
        self.max_batch = max(self.max_batch, max_batch)

    def phase_pass(self, phase: str, batch: int, tokens: int) -> ParallelPass:
        """Return a prefill or decode over all ranks, to be run again and again; one at a time, for the profiler.

        Raises:
            OutOfDeviceMemory: A device cannot hold it.
            DevicesLost: A rank ended.
        """
        with self._runtime.turn() as tell:
            tell(do="prepare", model=self._number, phase=phase, batch=batch, tokens=tokens, name=self.name)
            own = self._stage.phase_pass(phase, batch, tokens, self.name)
        kv_bytes = tuple(batch * tokens * each for each in self._stage.kv_bytes_per_token())
        return ParallelPass(own, self._stage.run_pass, self._lead(), kv_bytes)

    def _lead(self) -> Lead:
        def tokens() -> Future[dict[str, NDArray[Any]]]:
            return self._runtime.expect(("tokens",), (self._mesh.pp - 1) * self._mesh.tp)

        return Lead(model=self._number, turn=self._runtime.turn, tokens=tokens if self._mesh.pp > 1 else None)


_NUMBERS = itertools.count(1)
_LOOK_S = 0.02
"""How often is looked whether all ranks are there."""
_HOST = torch.device("cpu")


def _arrays(outputs: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(tensor.cpu().numpy()) for name, tensor in outputs.items()}


def _start_rank(
    rank: int, device: str, world: World, dtype: str, threads: int, model_dir: Path | None, seed: int
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "executor.runtime.rank", f"--rank={rank}"]
    command += [f"--size={world.size}", f"--device={device}", f"--dtype={dtype}", f"--threads={threads}"]
    command += [f"--seed={seed}", f"--store-port={world.store.port}"]
    command += [f"--model-dir={model_dir}"] if model_dir else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)  # noqa: S603 - our own module
