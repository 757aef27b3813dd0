"""The torch runtime of a worker: on one device of its own, or over all devices of its group."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from executor.cores import at_low_priority
from executor.runtime.protocol import DevicesLost, LoadedModel
from executor.runtime.torch_runtime import TorchRuntime
from plans.errors import InvalidInput

if TYPE_CHECKING:
    from executor.runtime.swapping import SwappingTorchRuntime

__all__ = ["TorchGroupRuntime"]


class TorchGroupRuntime:
    """Loads models onto a group's devices; see `executor.runtime.protocol.GroupRuntime`.

    Args:
        devices: ``cpu`` as often as the group has devices, or CUDA devices.
        dtype: As for `TorchRuntime`, and so the following.
        threads: Threads of each device's process.
        model_dir: Folder of local models.
        compiled: Run batches by torch.compile; on one device.
        cuda_graphs: Replay CUDA graphs; on one device.
        host_cache_bytes: Weights kept in host memory so that models are loaded again quickly; on one device.
        device_bytes: What models may take on the device together; above that they are swapped between batches, from
            host memory. 0 leaves that to the caller.

    Raises:
        InvalidInput: An argument is wrong.
        DevicesLost: The process of another device ended during its start.
    """

    def __init__(
        self,
        devices: Sequence[str] = ("cpu",),
        dtype: str = "fp32",
        threads: int = 1,
        model_dir: Path | None = None,
        *,
        compiled: bool = False,
        cuda_graphs: bool = False,
        host_cache_bytes: int = 0,
        device_bytes: int = 0,
    ) -> None:
        self._single: TorchRuntime | SwappingTorchRuntime | None = None
        if device_bytes and (len(devices) > 1 or compiled or cuda_graphs or not host_cache_bytes):
            found = f"{len(devices)} devices" + ", compiled" * compiled + ", CUDA graphs" * cuda_graphs
            expected = "one device with a host cache, neither compiled nor with CUDA graphs, to swap models"
            raise InvalidInput.of(expected, field="devices", found=f"{found}, {host_cache_bytes} bytes of host cache")
        if device_bytes:
            from executor.runtime.swapping import SwappingTorchRuntime

            self._single = SwappingTorchRuntime(
                devices[0], dtype, threads, model_dir, budget_bytes=host_cache_bytes, device_bytes=device_bytes
            )
        elif len(devices) == 1 and host_cache_bytes:
            from executor.runtime.host_cache import CachingTorchRuntime

            self._single = CachingTorchRuntime(
                devices[0],
                dtype,
                threads,
                model_dir,
                budget_bytes=host_cache_bytes,
                compiled=compiled,
                cuda_graphs=cuda_graphs,
            )
        elif len(devices) == 1:
            self._single = TorchRuntime(
                devices[0], dtype, threads, model_dir, compiled=compiled, cuda_graphs=cuda_graphs
            )
        elif compiled or cuda_graphs:
            found, expected = f"{len(devices)} devices", "one device: groups run neither compiled nor by CUDA graphs"
            raise InvalidInput.of(expected, field="devices", found=found)
        else:
            at_low_priority(lambda: importlib.import_module("executor.runtime.parallel"))  # torch.distributed: seconds
            from executor.runtime.parallel import ParallelTorchRuntime

            self._several = ParallelTorchRuntime(devices, dtype, threads, model_dir)

    def names(self) -> tuple[str, ...]:
        """Names that `load` knows, sorted."""
        return (self._single or self._several).names()

    def await_loss(self) -> DevicesLost | None:
        """Wait until the process of another device ended; None where there is none."""
        return None if self._single is not None else self._several.await_loss()

    def load(self, variant: str, max_batch: int, shape: tuple[int, int] = (1, 1)) -> LoadedModel:
        """Load ``variant``; see `executor.runtime.protocol.GroupRuntime`."""
        if self._single is None:
            return self._several.load(variant, max_batch, shape)
        if shape != (1, 1):
            found = f"tp {shape[0]} x pp {shape[1]}"
            raise InvalidInput.of("tp 1 x pp 1 on one device", where=variant, field="shape", found=found)
        return self._single.load(variant, max_batch)
