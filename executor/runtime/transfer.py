"""Copies of a batch between host memory and a CUDA device: from and to pinned memory, on a stream of their own.

Out of pinned memory a copy runs while the host goes on, so the tensors of a batch are on their way together, and the
copies of one batch need not wait for the kernels of another model on the device. Streams wait for each other on the
device only; the host waits once, for the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

__all__ = ["DeviceTransfer"]


class DeviceTransfer:
    """The copies of one model.

    Args:
        device: A CUDA device.
        dtype: Type of floating point numbers on the device.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def to_device(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
        """Return the arrays on the device; what runs on the current stream from now on waits for them."""
        current = torch.cuda.current_stream(self._device)
        tensors: dict[str, torch.Tensor] = {}
        with torch.cuda.stream(self._stream):
            for name, array in arrays.items():
                tensor = _pinned(array).to(self._device, non_blocking=True)
                tensors[name] = tensor.to(self._dtype) if tensor.is_floating_point() else tensor
        current.wait_stream(self._stream)
        for tensor in tensors.values():
            tensor.record_stream(current)  # its memory is not given to others before the kernels there are done
        return tensors

    def to_host(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
        """Return the tensors as FP32 arrays, once the current stream has made them and they are copied."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        copies: dict[str, torch.Tensor] = {}
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                tensor.record_stream(self._stream)
                copies[name] = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=True)
                copies[name].copy_(tensor.float(), non_blocking=True)
        self._stream.synchronize()
        return {name: copied.numpy() for name, copied in copies.items()}


def _pinned(array: NDArray[Any]) -> torch.Tensor:
    """Return a copy in pinned memory; it is taken from, and goes back to, what torch keeps."""
    pinned = torch.empty(array.shape, dtype=_DTYPES[array.dtype.name], pin_memory=True)
    pinned.numpy()[...] = array
    return pinned


_DTYPES = {"float32": torch.float32, "int64": torch.int64}
"""Types of the inputs that `executor.runtime.torch_runtime` builds models for."""
