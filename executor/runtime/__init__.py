"""Models on devices: the runtime's protocol, the registry of models, and the torch runtime.

Importing this package imports no torch; `executor.runtime.torch_runtime` does.
"""

from executor.runtime.protocol import (
    InvalidTensor,
    LoadedModel,
    OutOfDeviceMemory,
    Runtime,
    TensorSpec,
    UnknownVariant,
)

__all__ = [
    "Runtime",
    "LoadedModel",
    "TensorSpec",
    "InvalidTensor",
    "UnknownVariant",
    "OutOfDeviceMemory",
]
