"""Ranks of one group of devices, and how tensors pass between them: over gloo between CPUs, NCCL between CUDA devices.

Beside CUDA devices there is gloo too, for what lies in host memory: answers on their way to rank 0 come to a thread of
their own there, which on NCCL would keep what goes the other way between the same two ranks waiting.

Ranks are numbered stage by stage: rank ``stage * tp + k`` is shard k of a stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Mesh", "World", "receive", "send"]

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

    @property
    def absent(self) -> tuple[int, ...]:
        """Ranks that have not come to `join` yet; asked in rank 0, which would wait for them there for ever."""
        return tuple(rank for rank in range(1, self.size) if not self.store.check([_arrived(rank)]))

    def here(self) -> contextlib.AbstractContextManager[object]:
        """Make this rank's device the current one of this thread: CUDA begins each thread with the first of all.

        What torch puts on "the" CUDA device, such as the shards of a model, would go there.
        """
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def join(self) -> None:
        """Meet the other ranks; returns when all are there."""
        self.store.set(_arrived(self.rank), "")
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
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

    def agreed(self, holds: bool) -> bool:
        """Return whether it holds on every rank; every rank calls it at once."""
        own = torch.tensor([int(holds)])
        dist.all_reduce(own, op=dist.ReduceOp.MIN)
        return bool(own.item())


def _arrived(rank: int) -> str:
    return f"arrived/{rank}"


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
