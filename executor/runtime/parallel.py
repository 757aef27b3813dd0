"""Models over several devices: tensor parallel within a stage, pipeline parallel over stages.

One process per device. The process that uses `ParallelTorchRuntime` is rank 0; it starts the others
(``python -m executor.runtime.rank``) and tells them through their standard input what to load and run, so that they end
when it does. Activations travel over torch.distributed: gloo between CPUs, NCCL between CUDA devices. Every rank builds
the whole model from the same seed or files, and keeps its part.

Ranks are numbered stage by stage: rank ``stage * tp + k`` is shard k of a stage.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
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

from executor.runtime.protocol import TensorSpec, batch_of
from executor.runtime.sharding import check_shardable, shard
from executor.runtime.stages import Part, balanced, measured_s, parts_of
from executor.runtime.torch_runtime import TorchRuntime, check_tokens, random_inputs, to_tensor
from plans.errors import InvalidInput

__all__ = ["Cut", "Mesh", "ParallelModel", "ParallelTorchRuntime", "StageModel", "cut"]

_HEADER = 12
"""Numbers before a tensor: its dimensions, then their lengths."""
_FOREVER = timedelta(days=3650)
"""An idle group waits as long as it takes; a lost process ends its connections, which ends the wait."""


class Mesh:
    """This process's place among the ranks of one group.

    Args:
        rank: Its number.
        tp: Shards of a stage.
        pp: Stages.
        device: Its device.
        store_port: Port of rank 0's store on this machine; 0 in rank 0 itself, which opens one.
    """

    def __init__(self, *, rank: int, tp: int, pp: int, device: str, store_port: int = 0) -> None:
        self.rank, self.tp, self.pp = rank, tp, pp
        self.stage, self.shard = divmod(rank, tp)
        self.device = torch.device(device)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.store = dist.TCPStore(  # type: ignore[attr-defined]  # public, and not listed
            "127.0.0.1", store_port, tp * pp, is_master=rank == 0, wait_for_workers=False, timeout=_FOREVER
        )
        self._backend = backend

    def join(self) -> None:
        """Meet the other ranks; returns when all are there."""
        dist.init_process_group(
            self._backend, store=self.store, rank=self.rank, world_size=self.tp * self.pp, timeout=_FOREVER
        )
        ranks = torch.arange(self.tp * self.pp).reshape(self.pp, self.tp)
        self.shards = DeviceMesh(self.device.type, ranks, mesh_dim_names=("pp", "tp"))["tp"]
        self._shard_group = self.shards.get_group()

    def to_shards(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """Give every shard of the first stage what its shard 0 has."""
        return self._pass_on(
            tensor,
            lambda data: dist.broadcast(data, self.stage * self.tp, group=self._shard_group),
            gives=self.shard == 0,
        )

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        """Send a tensor to ``rank``."""
        self._pass_on(tensor, lambda data: dist.send(data, rank), gives=True)

    def receive(self, rank: int) -> torch.Tensor:
        """Wait for a tensor from ``rank``."""
        return self._pass_on(None, lambda data: dist.recv(data, rank), gives=False)

    def gathered(self, value: float) -> tuple[float, ...]:
        """Return the value of shard 0 of each stage; every rank calls it at once."""
        own = torch.tensor([value], dtype=torch.float64, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.tp * self.pp)]
        dist.all_gather(found, own)
        return tuple(tensor.item() for tensor in found[:: self.tp])

    def _pass_on(
        self, tensor: torch.Tensor | None, move: Callable[[torch.Tensor], object], *, gives: bool
    ) -> torch.Tensor:
        header = torch.zeros(_HEADER, dtype=torch.int64)
        if gives:
            assert tensor is not None
            header[0] = _TYPES.index(tensor.dtype)
            header[1] = tensor.dim()
            header[2 : 2 + tensor.dim()] = torch.tensor(tensor.shape)
        header = header.to(self.device)
        move(header)
        kind, dimensions, *lengths = header.tolist()
        if tensor is None or not gives:
            tensor = torch.empty(lengths[:dimensions], dtype=_TYPES[kind], device=self.device)
        else:
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


def cut(runtime: TorchRuntime, variant: str, tp: int, pp: int, edges: Sequence[int] | None = None) -> Cut:
    """Build ``variant`` and cut it into ``pp`` stages: at ``edges``, or where the measured times balance.

    Raises:
        UnknownVariant: There is no such model.
        InvalidInput: It cannot be cut this way.
    """
    module, inputs, wanted = runtime.build(variant)
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

        ``inputs`` are those of rank 0, and None elsewhere. Returns the outputs by name in the last stage.
        """
        mesh = self._mesh
        if mesh.stage == 0:
            hidden: Any = mesh.to_shards(inputs) if mesh.tp > 1 else inputs
        else:
            hidden = mesh.receive(mesh.rank - mesh.tp)
        start = time.perf_counter()
        with torch.no_grad():
            for part in self._parts:
                hidden = part(hidden)
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        self.run_s = time.perf_counter() - start
        if not self.is_last:
            mesh.send(hidden, mesh.rank + mesh.tp)
            return None
        return {name: hidden[name].float() for name in self._wanted}

    def return_outputs(self, outputs: Mapping[str, torch.Tensor]) -> None:
        """Send the outputs to rank 0, from shard 0 of a last stage that is not the first."""
        if self._mesh.stage and self._mesh.shard == 0:
            for name in self._wanted:
                self._mesh.send(outputs[name], 0)


class ParallelTorchRuntime:
    """The torch runtime over ``tp * pp`` devices of one machine; see `executor.runtime.protocol.Runtime`.

    Args:
        devices: One per rank: ``cpu`` again and again, or CUDA devices.
        tp: Shards of a stage.
        pp: Stages.
        dtype: As for `TorchRuntime`, and so the following.
        threads: Threads of each rank.
        model_dir: Folder of local models.
        seed: Of random weights.

    Attributes:
        tp: Shards of a stage.
        pp: Stages.

    Raises:
        InvalidInput: An argument is wrong.
    """

    def __init__(
        self,
        devices: Sequence[str],
        *,
        tp: int,
        pp: int,
        dtype: str = "fp32",
        threads: int = 1,
        model_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        if len(devices) != tp * pp or tp < 1 or pp < 1:
            found = f"{len(devices)} devices for tp = {tp}, pp = {pp}"
            raise InvalidInput.of("one device for each of tp * pp ranks", field="devices", found=found)
        self.tp, self.pp = tp, pp
        self._runtime = TorchRuntime(devices[0], dtype, threads, model_dir, seed)
        torch.set_num_threads(threads)
        self._mesh = Mesh(rank=0, tp=tp, pp=pp, device=devices[0])
        self._ranks = [
            _start_rank(rank, device, self._mesh, dtype, threads, model_dir, seed)
            for rank, device in enumerate(devices[1:], start=1)
        ]
        self._mesh.join()
        self._telling = threading.Lock()

    def names(self) -> tuple[str, ...]:
        """Names that `load` knows, sorted."""
        return self._runtime.names()

    def load(self, variant: str, max_batch: int) -> ParallelModel:
        """Load ``variant`` on every rank and run it once.

        Raises:
            UnknownVariant: There is no such model.
            InvalidInput: It cannot be cut this way, or ``max_batch`` is below 1.
        """
        if max_batch < 1:
            raise InvalidInput.of("at least 1", where=variant, field="max_batch", found=max_batch)
        return ParallelModel(variant, max_batch, self._runtime, self._mesh, self.tell)

    def tell(self, **command: Any) -> None:
        """Send a command to the other ranks."""
        line = (json.dumps(command) + "\n").encode()
        with self._telling:
            for process in self._ranks:
                assert process.stdin is not None
                process.stdin.write(line)
                process.stdin.flush()

    def close(self) -> None:
        """End the other ranks."""
        for process in self._ranks:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._ranks:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        dist.destroy_process_group()


class ParallelModel:
    """A model over the ranks; see `executor.runtime.protocol.LoadedModel`. Made by `ParallelTorchRuntime.load`.

    Batches may follow each other before the first is out: `submit` returns when the first stage is free again.

    Attributes:
        stage_weight_bytes: Bytes of weights on each GPU of each stage, shape (pp,).
    """

    def __init__(self, name: str, max_batch: int, runtime: TorchRuntime, mesh: Mesh, tell: Callable[..., None]) -> None:
        self.name = name
        self.max_batch = max_batch
        self._runtime = runtime
        self._mesh = mesh
        self._tell = tell
        self._waiting: SimpleQueue[Future[dict[str, NDArray[Any]]] | None] = SimpleQueue()
        start = time.perf_counter()
        whole = cut(runtime, name, mesh.tp, mesh.pp)  # what cannot be cut ends here, before other ranks hear of it
        tell(do="load", variant=name, edges=whole.edges)
        self.inputs = whole.inputs
        self._wanted = whole.wanted
        self._vocabulary = whole.vocabulary
        self._stage = StageModel(whole, mesh)
        self.stage_weight_bytes = tuple(map(int, mesh.gathered(self._stage.weight_bytes)))
        self.load_s = time.perf_counter() - start
        if mesh.pp > 1:
            threading.Thread(target=self._receive, name=f"outputs of {name}", daemon=True).start()
        start = time.perf_counter()
        first = self.run(self.example(1))
        self.first_inference_s = time.perf_counter() - start
        self.outputs = tuple(TensorSpec(key, "FP32", array.shape[1:]) for key, array in first.items())
        if mesh.device.type == "cuda" and max_batch > 1:
            self.run(self.example(max_batch))

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and buffers over all devices."""
        return sum(self.stage_weight_bytes) * self._mesh.tp

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one batch from start to end.

        Raises:
            InvalidTensor: The inputs do not fit; all faults.
        """
        return self.submit(inputs).result()

    def submit(self, inputs: Mapping[str, NDArray[Any]]) -> Future[dict[str, NDArray[Any]]]:
        """Start one batch and return when the first stage is free; the future holds its outputs.

        Raises:
            InvalidTensor: The inputs do not fit; all faults.
        """
        batch_of(inputs, self.inputs, max_batch=self.max_batch, where=self.name)
        check_tokens(self.name, self.inputs, self._vocabulary, inputs)
        (spec,) = self.inputs
        tensor = to_tensor(inputs[spec.name], self._mesh.device, self._runtime.dtype)
        answer: Future[dict[str, NDArray[Any]]] = Future()
        self._tell(do="run", variant=self.name)
        if self._mesh.pp > 1:
            self._waiting.put(answer)
            self._stage.step(tensor)
        else:
            answer.set_result(_arrays(self._stage.step(tensor)))
        return answer

    def stage_run_s(self) -> tuple[float, ...]:
        """Return the seconds that each stage computed for the last batch that is out, shape (pp,)."""
        self._tell(do="times", variant=self.name)
        return self._mesh.gathered(self._stage.run_s)

    def example(self, batch: int, seed: int = 0) -> dict[str, NDArray[Any]]:
        """Return valid random inputs for ``batch`` items; the same seed gives the same values."""
        return random_inputs(self.inputs, self._vocabulary, batch, seed)

    def close(self) -> None:
        """Free the model on every rank."""
        self._tell(do="unload", variant=self.name)
        self._waiting.put(None)

    def _receive(self) -> None:
        last = (self._mesh.pp - 1) * self._mesh.tp
        while (answer := self._waiting.get()) is not None:
            try:
                answer.set_result(_arrays({name: self._mesh.receive(last) for name in self._wanted}))
            except RuntimeError as error:  # a rank ended
                answer.set_exception(error)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _by_name(name: str) -> Callable[[Any, torch.Tensor], Any]:
    return lambda module, tensor: module(**{name: tensor})


def _arrays(outputs: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(tensor.cpu().numpy()) for name, tensor in outputs.items()}


def _start_rank(
    rank: int, device: str, mesh: Mesh, dtype: str, threads: int, model_dir: Path | None, seed: int
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "executor.runtime.rank", f"--rank={rank}", f"--tp={mesh.tp}"]
    command += [f"--pp={mesh.pp}", f"--device={device}", f"--dtype={dtype}", f"--threads={threads}"]
    command += [f"--seed={seed}", f"--store-port={mesh.store.port}"]
    command += [f"--model-dir={model_dir}"] if model_dir else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)  # noqa: S603 - our own module
