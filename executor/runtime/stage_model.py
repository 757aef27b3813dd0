"""What one rank holds of a model over several devices: where the whole is cut, and its shard of its stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from executor.runtime.generation import KvMemory, LlamaSequences, LlamaSteps, can_generate, generation_facts
from executor.runtime.generation_group import PhasePass
from executor.runtime.generation_stage import LlamaStage, stage_layers
from executor.runtime.memory import free_bytes, out_of_memory_named
from executor.runtime.mesh import Mesh, receive, send
from executor.runtime.precision import cast
from executor.runtime.protocol import GenerationFacts, OutOfDeviceMemory, TensorSpec
from executor.runtime.sharding import check_shardable, shard, sharded_layers
from executor.runtime.stages import Part, balanced, evened_s, measured_s, parts_of
from executor.runtime.torch_runtime import TorchRuntime, random_inputs, to_tensor
from plans.errors import InvalidInput

__all__ = ["Built", "Cut", "StageModel", "cut"]


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
    module = cast(module, runtime.dtype).eval().requires_grad_(False)
    if tp > 1:
        check_shardable(module, tp, variant)
    vocabulary = int(getattr(getattr(module, "config", None), "vocab_size", 0) or 0)
    parts = parts_of(module, variant) if pp > 1 else (Part(module, _by_name(inputs[0].name)),)
    if pp > len(parts):
        raise InvalidInput.of(f"at most {len(parts)} stages", where=variant, field="pp", found=pp)
    if edges is None and pp > 1:
        example = random_inputs(inputs, vocabulary, 1, 0)[inputs[0].name]
        with torch.no_grad():
            times_s = measured_s(parts, to_tensor(example, torch.device("cpu"), runtime.dtype))
        edges = balanced(evened_s(parts, times_s), pp)
    return Cut(
        module=module,
        parts=parts,
        edges=tuple(edges or (0, 1)),
        inputs=inputs,
        wanted=wanted,
        vocabulary=vocabulary,
    )


_STAGE_TOKENS = 512
"""Tokens of one pass of a prefill in a pipeline: few, so that stages work on several of its passes at once."""


class StageModel:
    """What one rank holds of a model: its shard of its stage.

    Every rank makes its own at once.

    Args:
        whole: The model; it is sharded in place.
        mesh: This rank's place.
        name: Of the model, for errors.

    Attributes:
        weight_bytes: Bytes of its weights and buffers.
        run_s: Seconds that it computed for the last batch.

    Raises:
        OutOfDeviceMemory: The weights do not fit on a device of the group. To find out while they are moved there would
            leave the other ranks waiting.
    """

    def __init__(self, whole: Cut, mesh: Mesh, name: str) -> None:
        own = nn.ModuleList(whole.parts[whole.edges[mesh.stage] : whole.edges[mesh.stage + 1]])
        needed, free = _shard_bytes(whole.module, own, mesh.tp), free_bytes(mesh.device)
        if not mesh.agreed(free is None or needed <= free):
            problem = f"its weights take {needed} bytes on {mesh.device}, which has {free} free; another may have less"
            raise OutOfDeviceMemory(f"{name} does not fit on the devices of the group: {problem}")
        if mesh.tp > 1:
            shard(whole.module, mesh.shards)
        self._parts = own.to(mesh.device)
        self._wanted = whole.wanted
        self._mesh = mesh
        self._generating: Any = None
        if can_generate(whole.module):
            self._generating = whole.module if mesh.pp == 1 else LlamaStage(whole.module, whole.edges, mesh)
        self._edges = whole.edges
        held = {id(tensor): tensor for tensor in (*self._parts.parameters(), *self._parts.buffers())}
        self.weight_bytes = sum(_local(tensor).numel() * tensor.element_size() for tensor in held.values())
        self.run_s = 0.0

    @property
    def is_last(self) -> bool:
        """Whether it is of the last stage."""
        return self._mesh.stage == self._mesh.pp - 1

    def step(self, inputs: torch.Tensor | None) -> Any:
        """Run this rank's part of one batch: what it gets, it computes on and hands over.

        ``inputs`` are those of rank 0, and None elsewhere. Returns the outputs by name, in host memory, in the last
        stage, whose shard 0 sends them to rank 0.
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
        outputs = {name: hidden[name].float().cpu() for name in self._wanted}
        if mesh.stage and mesh.shard == 0:
            for tensor in outputs.values():
                send(tensor, 0)
        return outputs

    def facts(self, *, from_files: bool = False) -> GenerationFacts:
        """Return what a model that generates takes, over all ranks."""
        module: Any = self._generating
        return generation_facts(module.config, module.dtype, from_files=from_files)

    def kv_bytes_per_token(self) -> tuple[int, ...]:
        """Return the bytes of one token's keys and values on each device of a stage; shape (pp,)."""
        layers: int = self._generating.config.num_hidden_layers
        layer_bytes = self.facts().kv_bytes_per_token // (layers * self._mesh.tp)
        edges = self._edges if self._mesh.pp > 1 else (0, layers + 2)
        return tuple(layer_bytes * len(stage_layers(edges, stage, layers)) for stage in range(self._mesh.pp))

    def sequences(self, kv_tokens: int, facts: GenerationFacts, name: str) -> LlamaSequences:
        """Return what runs this rank's part of sequences, with key-value memory for so many tokens.

        Every rank calls it at once, as the following.

        Raises:
            OutOfDeviceMemory: A device cannot hold so many.
        """
        return LlamaSequences(self._steps(kv_tokens, 1, name), facts, name)

    def phase_pass(self, phase: str, batch: int, tokens: int, name: str) -> PhasePass:
        """Return this rank's part of a prefill or decode that is run again and again; see `PhasePass`.

        Raises:
            OutOfDeviceMemory: A device cannot hold it.
        """
        return PhasePass(self._steps(batch * tokens, batch, name), phase, batch, tokens, name)

    def run_pass(self, own: PhasePass) -> list[int]:
        """Run this rank's part of a pass once; see `PhasePass`."""
        stage = self._generating
        if not isinstance(stage, LlamaStage):
            return own()
        stage.run_s = 0.0
        tokens = own()
        self.run_s = stage.run_s
        return tokens

    def hand_back(self, tokens: Sequence[int]) -> None:
        """Send rank 0 the tokens that the last stage found, where that is another."""
        if self._mesh.stage and self.is_last and self._mesh.shard == 0:
            send(torch.tensor(tokens), 0)

    def _steps(self, tokens: int, batch: int, name: str) -> LlamaSteps:
        """Return this rank's steps with key-value memory of its heads and layers, if every rank can have it."""
        module, mesh = self._generating, self._mesh
        layers, packed = (module.layers, _STAGE_TOKENS) if isinstance(module, LlamaStage) else (None, None)
        memory = None
        try:
            with out_of_memory_named(name, batch):
                memory = KvMemory(module.config, tokens, mesh.device, module.dtype, mesh.tp, layers)
        finally:
            everywhere = mesh.agreed(memory is not None)
        if not everywhere or memory is None:
            raise OutOfDeviceMemory(f"{name}: another device of the group has no memory for {tokens} tokens")
        return LlamaSteps(module, memory, packed)

    def gather_times(self) -> tuple[float, ...]:
        """Return the seconds that each stage computed for its last batch, shape (pp,); every rank calls it at once."""
        return self._mesh.gathered(self.run_s)


def _shard_bytes(module: nn.Module, own: nn.Module, tp: int) -> int:
    """Return the bytes of the weights and buffers of ``own``, a stage of ``module``, on each of ``tp`` devices."""
    held = {id(tensor): tensor.nbytes for tensor in (*own.parameters(), *own.buffers())}
    cut_layers = [layer for layer, _ in sharded_layers(module).values()] if tp > 1 else []
    cut_bytes = sum(held.get(id(layer.weight), 0) for layer in cut_layers)
    return sum(held.values()) - cut_bytes + cut_bytes // tp


def _local(tensor: torch.Tensor) -> torch.Tensor:
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _by_name(name: str) -> Callable[[Any, torch.Tensor], Any]:
    return lambda module, tensor: module(**{name: tensor})
