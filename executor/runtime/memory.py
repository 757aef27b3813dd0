"""How much device memory a piece of work takes."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from executor.runtime.protocol import OutOfDeviceMemory
from profiles.memory import resident_growth_bytes

__all__ = [
    "LiveTensors",
    "free_bytes",
    "held_bytes",
    "keep_freed_memory",
    "out_of_memory_named",
    "peak_growth_bytes",
    "peak_tensor_bytes",
]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Let the C library keep blocks of up to 1 GiB that were freed, for the next batch; say whether it can.

    By default glibc maps every block above 32 MiB afresh, and the kernel clears each page of it again: batches of eight
    images took 8 to 45 % more CPU time that way. A setting of the whole process, and of no use for blocks that a thread
    other than the main one asks for.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl and macOS do not
    if adjust is None:
        return False
    return bool(adjust(_M_MMAP_THRESHOLD, _KEPT_BYTES) and adjust(_M_TRIM_THRESHOLD, _KEPT_BYTES))


def peak_growth_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Run ``action`` once and return the bytes that it took on top of what was held before, at the peak.

    Warm up first: what is set up lazily, and the pages of a library's code, count where they show for the first time.
    On CUDA that is what the caching allocator counted. On the CPU it is the larger of `peak_tensor_bytes` and the
    growth of the resident set, which sees what kernels take inside and what the allocator loses to fragments, but not
    memory that the process still held from earlier work.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    tensor_bytes: list[int] = []
    resident_bytes = resident_growth_bytes(lambda: tensor_bytes.append(peak_tensor_bytes(action)))
    return max(resident_bytes, *tensor_bytes)


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process can still have on a CUDA device; None for a CPU, which does not say."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def held_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Run ``action`` once and return all bytes that the process then holds on a CUDA device.

    What CUDA graphs work in stays reserved for them and is none of the tensors that `peak_growth_bytes` counts.
    """
    action()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def peak_tensor_bytes(action: Callable[[], object]) -> int:
    """Run ``action`` once and return the most bytes of tensors made by it that were alive at once, between operations.

    Exact and repeatable, whatever the allocator does; what a kernel takes inside an operation does not show.
    """
    tensors = LiveTensors()
    with tensors:
        action()
    return tensors.peak_bytes


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._held_bytes = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage(), given)
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        return result

    def _hold(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if id(storage) in given or storage in self._known:
            return
        self._known.add(storage)
        self._held_bytes += storage.nbytes()
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size_bytes: int) -> None:
        self._held_bytes -= size_bytes


@contextmanager
def out_of_memory_named(variant: str, batch: int) -> Iterator[None]:
    """Raise torch's error of a full device as `OutOfDeviceMemory`, with the model and the batch."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        problem = f"{variant} does not fit on the device at batch {batch}: {str(error).splitlines()[0]}"
        raise OutOfDeviceMemory(problem) from error
