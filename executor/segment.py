"""Memory that an agent and one worker share, for tensors.

A memfd: memory with a descriptor and no name. The agent makes it and the worker inherits the descriptor, so the kernel
frees it when both are gone, however they went; nothing is ever left in ``/dev/shm``. Only the agent makes it larger,
and nobody makes it smaller, so an array over it stays valid.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from executor.runtime.protocol import NUMPY_TYPES
from executor.tensors import Array, datatype_of
from executor.worker_wire import TensorPlace

__all__ = ["ALIGNMENT_BYTES", "SharedSegment", "aligned", "place_all"]

ALIGNMENT_BYTES = 64
"""Every tensor starts on a cache line, which is also what vector instructions like."""

_KNOWN = 1024
"""Places that are remembered: to make an array anew takes longer than to copy a small tensor."""


def aligned(size_bytes: int) -> int:
    """Return ``size_bytes`` rounded up to `ALIGNMENT_BYTES`."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def place_all(tensors: Mapping[str, tuple[str, tuple[int, ...]]], offset_bytes: int) -> tuple[TensorPlace, ...]:
    """Lay tensors, given as name to (datatype, shape), one after the other from ``offset_bytes`` on."""
    places = []
    for name, (datatype, shape) in tensors.items():
        size_bytes = math.prod(shape) * NUMPY_TYPES[datatype].itemsize
        places.append(
            TensorPlace(name=name, datatype=datatype, shape=shape, offset_bytes=offset_bytes, size_bytes=size_bytes)
        )
        offset_bytes += aligned(size_bytes)
    return tuple(places)


class SharedSegment:
    """One side of the shared memory. ``descriptor`` is owned and closed by `close`."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None
        self._arrays: dict[TensorPlace, Array] = {}  # of late; batches return to the same places
        self._output_places: dict[tuple[object, ...], tuple[TensorPlace, ...]] = {}

    @classmethod
    def create(cls) -> SharedSegment:
        """Make an empty segment."""
        return cls(os.memfd_create("foreplan-tensors", os.MFD_CLOEXEC))

    @property
    def size_bytes(self) -> int:
        """Bytes in the segment."""
        return os.fstat(self.descriptor).st_size

    def grow(self, size_bytes: int) -> None:
        """Make the segment at least ``size_bytes`` long. Arrays over it stay valid."""
        if size_bytes > self.size_bytes:
            os.ftruncate(self.descriptor, size_bytes)

    def array(self, place: TensorPlace) -> Array:
        """Return the tensor at ``place``, as an array over the shared memory.

        Raises:
            ValueError: The place reaches beyond the segment, or contradicts itself.
        """
        known = self._arrays.get(place)
        if known is not None:
            return known
        dtype = NUMPY_TYPES[place.datatype]
        count = math.prod(place.shape)
        if place.size_bytes != count * dtype.itemsize:
            raise ValueError(f"a tensor of {place.datatype} {list(place.shape)} in {place.size_bytes} bytes")
        flat: np.ndarray[Any, np.dtype[Any]] = np.frombuffer(
            self._mapping(place.offset_bytes + place.size_bytes), dtype=dtype, count=count, offset=place.offset_bytes
        )
        array = flat.reshape(place.shape)
        if len(self._arrays) >= _KNOWN:
            self._arrays.clear()
        self._arrays[place] = array
        return array

    def write(self, arrays: Mapping[str, Iterable[Array]], places: Iterable[TensorPlace]) -> None:
        """Copy arrays to their places; those of one name are laid one after the other along the first dimension."""
        for place in places:
            target = self.array(place)
            start = 0
            for part in arrays[place.name]:
                target[start : start + part.shape[0]] = part
                start += part.shape[0]

    def write_outputs(
        self, arrays: Mapping[str, Array], offset_bytes: int, capacity_bytes: int
    ) -> tuple[TensorPlace, ...]:
        """Copy arrays one after the other into a region and return where they lie.

        Raises:
            ValueError: They need more than ``capacity_bytes``.
        """
        key = (offset_bytes, capacity_bytes, *((name, array.dtype, array.shape) for name, array in arrays.items()))
        places = self._output_places.get(key)
        if places is None:
            places = place_all({name: (datatype_of(one), one.shape) for name, one in arrays.items()}, offset_bytes)
            needed_bytes = max((place.offset_bytes + place.size_bytes for place in places), default=0) - offset_bytes
            if needed_bytes > capacity_bytes:
                raise ValueError(f"outputs of {needed_bytes} bytes in a region of {capacity_bytes}")
            if len(self._output_places) >= _KNOWN:
                self._output_places.clear()
            self._output_places[key] = places
        for place in places:
            self.array(place)[...] = arrays[place.name]
        return places

    def close(self) -> None:
        """Give the memory back once the last array over it is gone."""
        descriptor, self.descriptor, self._map = self.descriptor, -1, None
        self._arrays.clear()
        if descriptor >= 0:
            os.close(descriptor)

    def _mapping(self, end_bytes: int) -> mmap.mmap:
        if self._map is None or len(self._map) < end_bytes:
            size_bytes = self.size_bytes
            if end_bytes > size_bytes:
                raise ValueError(f"a tensor that ends at byte {end_bytes} of {size_bytes}")
            self._map = mmap.mmap(self.descriptor, size_bytes)  # the old one lives as long as arrays over it
        return self._map
