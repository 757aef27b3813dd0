"""What makes a module run faster: torch.compile and CUDA graphs. Both take their time at the first batch of a size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from plans.errors import Fault, InvalidInput

__all__ = ["GraphedModule", "acceleration_faults", "compiled_module"]


def acceleration_faults(device: str, *, compiled: bool, cuda_graphs: bool) -> Iterator[Fault]:
    """Yield what speaks against these options on ``device``."""
    if cuda_graphs and not device.startswith("cuda"):
        expected = "a CUDA device"
        yield Fault(field="cuda_graphs", found=f"device {device}", expected=expected, remedy="leave CUDA graphs off")
    if compiled and device == "cpu" and not _has_cpp_compiler():
        yield Fault(
            field="compile",
            found="no C++ compiler on this machine",
            expected="one that torch.compile finds, such as g++ or clang++",
            remedy="install one, or leave compiling off",
        )


def _has_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def compiled_module(module: torch.nn.Module, where: str) -> Any:
    """Return what runs ``module`` by torch.compile; it compiles when it first runs, and again for other batches.

    What is returned raises InvalidInput when torch cannot compile the model.
    """
    from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError, Unsupported

    run = torch.compile(module)

    def call(**inputs: torch.Tensor) -> Any:
        try:
            return run(**inputs)
        except (BackendCompilerFailed, TorchRuntimeError, Unsupported) as error:
            problem = str(error).splitlines()[0]
            expected = "a model that torch can compile"
            raise InvalidInput.of(
                expected, where=where, field="compile", found=problem, remedy="leave compiling off"
            ) from error

    return call


class GraphedModule:
    """Runs a module by replaying CUDA graphs, one for each shape of inputs, recorded when the shape first comes.

    The kernels of a batch are launched at once, without Python between them. What `__call__` returns is overwritten by
    the next call: all graphs work in the same memory, which is as large as the largest needs.

    Args:
        run: The module, or what runs it.
        device: Its CUDA device.
        where: Name of the model, for errors.
    """

    def __init__(self, run: Any, device: torch.device, where: str) -> None:
        self._run = run
        self._device = device
        self._where = where
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], Any]] = {}
        self._pool: Any = None

    def __call__(self, **inputs: torch.Tensor) -> Any:
        """Return what the module returns.

        Raises:
            InvalidInput: The module does what cannot be recorded, such as looking at values.
            torch.OutOfMemoryError: The device is full.
        """
        shape = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(inputs.items()))
        if shape not in self._graphs:
            self._graphs[shape] = self._record(inputs)
        graph, fixed, answer = self._graphs[shape]
        for name, tensor in inputs.items():
            fixed[name].copy_(tensor)
        graph.replay()
        return answer

    def forget(self) -> None:
        """Drop what was recorded, and its memory; it is recorded again when it is needed."""
        self._graphs.clear()
        self._pool = None

    def _record(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], Any]:
        fixed = {name: tensor.clone() for name, tensor in inputs.items()}
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device):
            beside: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            beside.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(beside):  # what is set up lazily must be there before recording
                for _ in range(3):
                    self._run(**fixed)
            torch.cuda.current_stream(self._device).wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            try:
                # Another thread may load a model meanwhile: only this thread's unsafe calls may end the recording.
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    answer = self._run(**fixed)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise InvalidInput.of(
                    "a model whose kernels can be recorded",
                    where=self._where,
                    field="cuda_graphs",
                    found=str(error).splitlines()[0],
                    remedy="leave CUDA graphs off",
                ) from error
        return graph, fixed, answer
