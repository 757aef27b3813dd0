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
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from executor.runtime.protocol import DevicesLost, TensorSpec, batch_of
from executor.runtime.sharding import check_shardable, shard
from executor.runtime.stages import Part, balanced, measured_s, parts_of
from executor.runtime.torch_runtime import TorchRuntime, check_tokens, random_inputs, to_tensor
from plans.errors import InvalidInput

__all__ = ["Cut", "Mesh", "ParallelModel", "ParallelTorchRuntime", "StageModel", "World", "cut"]

_HEADER = 12
"""Numbers before a tensor: its dimensions, then their lengths."""
_FOREVER = timedelta(days=3650)
"""An idle group waits as long as it takes; a lost process ends its connections, which ends the wait."""


class World:
    """This process among the ranks of one group of devices.

    Args:
        rank: Its number.
        size: Number of ranks.
        device: Its device.
        store_port: Port of rank 0's store on this machine; 0 in rank 0 itself, which opens one.
    """

    def __init__(self, *, rank: int, size: int, device: str, store_port: int = 0) -> None:
        self.rank, self.size = rank, size
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.store = dist.TCPStore(  # type: ignore[attr-defined]  # public, and not listed
            "127.0.0.1", store_port, size, is_master=rank == 0, wait_for_workers=False, timeout=_FOREVER
        )
        self._meshes: dict[tuple[int, int], Mesh] = {}

    def join(self) -> None:
        """Meet the other ranks; returns when all are there."""
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.size, timeout=_FOREVER)

    def mesh(self, tp: int, pp: int) -> Mesh:
        """Return this rank's place in a shape; every rank asks for it at once."""
        if (tp, pp) not in self._meshes:
            self._meshes[tp, pp] = Mesh(self, tp, pp)
        return self._meshes[tp, pp]


class Mesh:
    """This rank's place in one shape: rank ``stage * tp + shard``.

    Attributes:
        tp: Shards of a stage.
        pp: Stages.
        stage: Its stage.
        shard: Its shard.
        device: Its device.
        shards: The ranks of its stage.
    """

    def __init__(self, world: World, tp: int, pp: int) -> None:
        self.rank, self.tp, self.pp = world.rank, tp, pp
        self.stage, self.shard = divmod(world.rank, tp)
        self.device = world.device
        ranks = torch.arange(tp * pp).reshape(pp, tp)
        self.shards = DeviceMesh(self.device.type, ranks, mesh_dim_names=("pp", "tp"))["tp"]
        self._shard_group = self.shards.get_group()

    def to_shards(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """Give every shard of the stage what its shard 0 has."""

        def move(data: torch.Tensor) -> None:
            dist.broadcast(data, self.stage * self.tp, group=self._shard_group)

        return _pass_on(tensor, move, self.device)

    def gathered(self, value: float) -> tuple[float, ...]:
        """Return the value of shard 0 of each stage; every rank calls it at once."""
        own = torch.tensor([value], dtype=torch.float64, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.tp * self.pp)]
        dist.all_gather(found, own)
        return tuple(tensor.item() for tensor in found[:: self.tp])


def send(tensor: torch.Tensor, rank: int) -> None:
    """Send a tensor to ``rank``."""
    _pass_on(tensor, lambda data: dist.send(data, rank), tensor.device)


def receive(device: torch.device, rank: int) -> torch.Tensor:
    """Wait for a tensor from ``rank``."""
    return _pass_on(None, lambda data: dist.recv(data, rank), device)


def _pass_on(tensor: torch.Tensor | None, move: Callable[[torch.Tensor], object], device: torch.device) -> torch.Tensor:
    """Move a header that says type and shape, then the tensor; who has none gets it."""
    header = torch.zeros(_HEADER, dtype=torch.int64)
    if tensor is not None:
        header[0] = _TYPES.index(tensor.dtype)
        header[1] = tensor.dim()
        header[2 : 2 + tensor.dim()] = torch.tensor(tensor.shape)
    header = header.to(device)
    move(header)
    if tensor is None:
        kind, dimensions, *lengths = header.tolist()
        tensor = torch.empty(lengths[:dimensions], dtype=_TYPES[kind], device=device)
    tensor = tensor.contiguous()
    move(tensor)
    return tensor


_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A whole model, and where it is cut.

    Attributes:
        module: The model, on the CPU.
        parts: Its parts; a single one without pipeline.
        edges: First part of each stage, and the end; shape (pp + 1,).
        inputs: What it wants.
        wanted: Names of its outputs.
        vocabulary: Tokens that it knows; 0 where it takes none.
    """

    module: nn.Module
    parts: tuple[Part, ...]
    edges: tuple[int, ...]
    inputs: tuple[TensorSpec, ...]
    wanted: tuple[str, ...]
    vocabulary: int


Built = tuple[nn.Module, tuple[TensorSpec, ...], tuple[str, ...]]
"""A model as `TorchRuntime.build` returns it."""


def cut(
    runtime: TorchRuntime,
    variant: str,
    tp: int,
    pp: int,
    *,
    built: Built | None = None,
    edges: Sequence[int] | None = None,
) -> Cut:
    """Cut ``variant`` into ``pp`` stages: at ``edges``, or where the measured times balance.

    Args:
        runtime: Builds the model, unless it is ``built`` already.
        variant: Name of the model.
        tp: Shards of a stage.
        pp: Stages.
        built: The model.
        edges: See `Cut`.

    Raises:
        UnknownVariant: There is no such model.
        InvalidInput: It cannot be cut this way.
    """
    module, inputs, wanted = built or runtime.build(variant)
    module = module.to(dtype=runtime.dtype).eval().requires_grad_(False)
    if tp > 1:
        check_shardable(module, tp, variant)
    vocabulary = int(getattr(getattr(module, "config", None), "vocab_size", 0) or 0)
    parts = parts_of(module, variant) if pp > 1 else (Part(module, _by_name(inputs[0].name)),)
    if pp > len(parts):
        raise InvalidInput.of(f"at most {len(parts)} stages", where=variant, field="pp", found=pp)
    if edges is None and pp > 1:
        example = random_inputs(inputs, vocabulary, 1, 0)[inputs[0].name]
        with torch.no_grad():
            edges = balanced(measured_s(parts, to_tensor(example, torch.device("cpu"), runtime.dtype)), pp)
    return Cut(
        module=module,
        parts=parts,
        edges=tuple(edges or (0, 1)),
        inputs=inputs,
        wanted=wanted,
        vocabulary=vocabulary,
    )


class StageModel:
    """What one rank holds of a model: its shard of its stage.

    Args:
        whole: The model; it is sharded in place.
        mesh: This rank's place.

    Attributes:
        weight_bytes: Bytes of its weights and buffers.
        run_s: Seconds that it computed for the last batch.
    """

    def __init__(self, whole: Cut, mesh: Mesh) -> None:
        if mesh.tp > 1:
            shard(whole.module, mesh.shards)
        own = whole.parts[whole.edges[mesh.stage] : whole.edges[mesh.stage + 1]]
        self._parts = nn.ModuleList(own).to(mesh.device)
        self._wanted = whole.wanted
        self._mesh = mesh
        held = {id(tensor): tensor for tensor in (*self._parts.parameters(), *self._parts.buffers())}
        self.weight_bytes = sum(_local(tensor).numel() * tensor.element_size() for tensor in held.values())
        self.run_s = 0.0

    @property
    def is_last(self) -> bool:
        """Whether it is of the last stage."""
        return self._mesh.stage == self._mesh.pp - 1

    def step(self, inputs: torch.Tensor | None) -> Any:
        """Run this rank's part of one batch: what it gets, it computes on and hands over.

        ``inputs`` are those of rank 0, and None elsewhere. Returns the outputs by name in the last stage, whose shard 0
        sends them to rank 0.
        """
        mesh = self._mesh
        if mesh.stage == 0:
            hidden: Any = mesh.to_shards(inputs) if mesh.tp > 1 else inputs
        else:
            hidden = receive(mesh.device, mesh.rank - mesh.tp)
        start = time.perf_counter()
        with torch.no_grad():
            for part in self._parts:
                hidden = part(hidden)
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        self.run_s = time.perf_counter() - start
        if not self.is_last:
            send(hidden, mesh.rank + mesh.tp)
            return None
        outputs = {name: hidden[name].float() for name in self._wanted}
        if mesh.stage and mesh.shard == 0:
            for tensor in outputs.values():
                send(tensor, 0)
        return outputs

    def gather_times(self) -> tuple[float, ...]:
        """Return the seconds that each stage computed for its last batch, shape (pp,); every rank calls it at once."""
        return self._mesh.gathered(self.run_s)


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
        self.world.join()
        self._receiver = threading.Thread(target=self._receive, name="outputs", daemon=True)
        self._receiver.start()

    def names(self) -> tuple[str, ...]:
        """Names that `load` knows, sorted."""
        return self.torch_runtime.names()

    def load(self, variant: str, max_batch: int, shape: tuple[int, int]) -> ParallelModel:
        """Load ``variant`` on every rank and run it once.

        Raises:
            UnknownVariant: There is no such model.
            InvalidInput: It cannot be cut this way, or ``max_batch`` is below 1.
            DevicesLost: Another rank ended.
        """
        tp, pp = shape
        if max_batch < 1:
            raise InvalidInput.of("at least 1", where=variant, field="max_batch", found=max_batch)
        if tp * pp != self.world.size or min(tp, pp) < 1:
            found = f"tp {tp} x pp {pp}"
            raise InvalidInput.of(f"tp x pp = {self.world.size} devices", where=variant, field="shape", found=found)
        return ParallelModel(self, variant, max_batch, tp, pp)

    @contextlib.contextmanager
    def turn(self) -> Iterator[Callable[..., None]]:
        """Let one thread at a time tell the ranks what to do and do its own part; give it the way to tell them.

        What fails in the middle leaves the ranks out of step: the group is lost.
        """
        with self._turns:
            try:
                yield self._tell
            except (RuntimeError, OSError) as error:
                raise DevicesLost(f"a rank ended, or failed in the middle of a batch: {error}") from error

    def expect(self, outputs: Sequence[str], rank: int) -> Future[dict[str, NDArray[Any]]]:
        """Return the outputs that ``rank`` will send next; called in a turn, so that they come in that order."""
        answer: Future[dict[str, NDArray[Any]]] = Future()
        self._expected.put(_Expected(answer, tuple(outputs), rank))
        return answer

    def close(self) -> None:
        """End the other ranks."""
        self._expected.put(None)
        self._receiver.join(timeout=5)
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
        dist.destroy_process_group()

    def _tell(self, **command: Any) -> None:
        line = (json.dumps(command) + "\n").encode()
        for process in self._ranks:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()

    def _receive(self) -> None:
        while (expected := self._expected.get()) is not None:
            try:
                outputs = {name: receive(self.world.device, expected.rank) for name in expected.outputs}
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

    def __init__(self, runtime: ParallelTorchRuntime, name: str, max_batch: int, tp: int, pp: int) -> None:
        self.name = name
        self.max_batch = max_batch
        self._runtime = runtime
        self._number = next(_NUMBERS)
        start = time.perf_counter()
        with runtime.turn() as tell:
            tell(do="build", model=self._number, variant=name)  # meanwhile: other models go on running
        try:
            whole = cut(runtime.torch_runtime, name, tp, pp)
        except BaseException:
            self.close()
            raise
        self.inputs = whole.inputs
        self._wanted = whole.wanted
        self._vocabulary = whole.vocabulary
        with runtime.turn() as tell:
            tell(do="load", model=self._number, shape=[tp, pp], edges=whole.edges)
            self._mesh = runtime.world.mesh(tp, pp)
            self._stage = StageModel(whole, self._mesh)
            self.stage_weight_bytes = tuple(map(int, self._mesh.gathered(self._stage.weight_bytes)))
        self.load_s = time.perf_counter() - start
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


_NUMBERS = itertools.count(1)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _by_name(name: str) -> Callable[[Any, torch.Tensor], Any]:
    return lambda module, tensor: module(**{name: tensor})


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
