"""Weights that stay in host memory, so that a variant which was loaded before is back soon.

Building a model, or reading its files, takes most of a load. A worker with a budget keeps the modules of what it has
loaded; loading such a variant again is a copy to the device, from pinned memory, and on a CPU no work at all: there the
module kept is the one that runs, and a variant loaded again for other batches shares it.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from pathlib import Path

import torch

from executor.runtime.precision import cast
from executor.runtime.protocol import TensorSpec
from executor.runtime.torch_runtime import TorchRuntime
from plans.errors import InvalidInput

__all__ = ["CachingTorchRuntime", "HostCache", "Recipe", "placed_copy", "size_bytes"]

Recipe = tuple[torch.nn.Module, tuple[TensorSpec, ...], tuple[str, ...]]
"""A module in host memory, its inputs, and the names of its outputs."""


class HostCache:
    """Modules by variant, within a budget; the one whose last use is longest ago goes first. Threads may share it.

    Args:
        budget_bytes: Of all parameters and buffers together. A larger module is not kept.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[str, tuple[Recipe, int]] = OrderedDict()
        self._changing = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of all modules that are kept."""
        with self._changing:
            return self._held_bytes()

    def get(self, variant: str) -> Recipe | None:
        """Return what is kept of ``variant``, as used now."""
        with self._changing:
            if variant not in self._kept:
                return None
            self._kept.move_to_end(variant)
            return self._kept[variant][0]

    def put(self, variant: str, recipe: Recipe) -> bool:
        """Keep ``recipe``, in the place of others where needed; say whether it is kept."""
        size = size_bytes(recipe[0])
        with self._changing:
            self._kept.pop(variant, None)
            if size > self._budget_bytes:
                return False
            while self._held_bytes() + size > self._budget_bytes:
                self._kept.popitem(last=False)
            self._kept[variant] = recipe, size
            return True

    def _held_bytes(self) -> int:
        return sum(size for _, size in self._kept.values())


class CachingTorchRuntime(TorchRuntime):
    """A `TorchRuntime` that keeps the weights of what it has loaded in host memory.

    Args:
        device: As for `TorchRuntime`, and so the following.
        dtype: Of the weights; they are kept in it.
        threads: Of one operation.
        model_dir: Folder of local models; a change of its files is not seen while the model is kept.
        budget_bytes: Of the weights that are kept, at least 1. On a CUDA device that is pinned memory beside the
            device's own; on a CPU it counts what runs as well, though that takes no more memory.
        compiled: As for `TorchRuntime`.
        cuda_graphs: Likewise.

    Raises:
        InvalidInput: As for `TorchRuntime`, or the budget is below 1.
    """

    def __init__(
        self,
        device: str,
        dtype: str,
        threads: int,
        model_dir: Path | None,
        *,
        budget_bytes: int,
        compiled: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__(device, dtype, threads, model_dir, compiled=compiled, cuda_graphs=cuda_graphs)
        if budget_bytes < 1:
            raise InvalidInput.of("at least 1 byte", field="host_cache_bytes", found=budget_bytes)
        self.place = torch.device(device)
        self.cache = HostCache(budget_bytes)
        self._building = threading.Lock()

    def build(self, variant: str) -> Recipe:
        """Return what is kept of ``variant``, on the device; else build it, and keep it where the budget allows.

        Raises:
            UnknownVariant: Neither the registry nor the folder has the model.
            InvalidInput: The model's folder is damaged.
        """
        recipe = self.host_recipe(variant)
        if self.place.type == "cpu":
            return recipe
        return placed_copy(recipe[0], self.place), *recipe[1:]

    def host_recipe(self, variant: str) -> Recipe:
        """Return what is kept of ``variant``; else build it, and keep it where the budget allows.

        Threads may call it. They build one after the other: random weights come from torch's one generator, and
        transformers sets what holds for the whole process while it builds.

        Raises:
            UnknownVariant: Neither the registry nor the folder has the model.
            InvalidInput: The model's folder is damaged.
        """
        return self.cache.get(variant) or self._built(variant)

    def _built(self, variant: str) -> Recipe:
        with self._building:
            recipe = self.cache.get(variant)  # another thread may have built it meanwhile
            if recipe is not None:
                return recipe
            module, inputs, wanted = super().build(variant)
            recipe = cast(module, self.dtype).eval().requires_grad_(False), inputs, wanted
            kept = self.cache.put(variant, recipe)
            if kept and self.place.type == "cuda":
                _pin(recipe[0])
            return recipe


def size_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of the parameters and buffers of ``module``; shared ones count once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def placed_copy(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Return a copy of ``module`` with its parameters and buffers on ``device``; those that are shared stay shared.

    From pinned memory the copies run one after the other without waits in between.
    """
    moved: dict[int, object] = {}
    for parameter in module.parameters():
        moved[id(parameter)] = torch.nn.Parameter(
            parameter.detach().to(device, copy=True, non_blocking=True), requires_grad=False
        )
    for buffer in module.buffers():
        moved[id(buffer)] = buffer.to(device, copy=True, non_blocking=True)
    return copy.deepcopy(module, moved)


def _pin(module: torch.nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.pin_memory()
