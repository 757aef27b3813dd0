"""What an agent must know of a request before it looks at the tensors' contents.

Clients send many requests that differ in their tensors only, so what has been read of such a head is kept: reading it
anew would cost as much as all else that is done for the request.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from executor.infer_header import deadline_of, parsed_request, priority_of, split_fields, stream_of
from executor.proto import open_inference_pb2 as pb
from executor.runtime.protocol import batch_of
from executor.tensors import Array, Buffer, TensorLimits, described_inputs, extension_faults
from executor.worker_wire import Loaded
from plans.errors import InvalidInput

__all__ = ["Fits", "HeadReader", "RequestHead"]

_KNOWN_HEADS, _LONGEST_KNOWN = 1024, 512
"""How many heads are remembered, and the longest of them in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestHead:
    """A request without raw contents, and what follows from that. Shared by requests: nothing may change it.

    Attributes:
        message: The request; its raw contents may be left out.
        described: Arrays of the claimed types and shapes, without contents (`executor.tensors.described_inputs`).
        wanted: Names of the outputs asked for; none for all.
        deadline_s: The deadline in its parameters, seconds from arrival, or None.
        priority: From 1, which goes first.
        stream: The stream that it is a frame of; empty for none.
        recurs: Whether the head is remembered, so that other requests may have the very same.
    """

    message: pb.ModelInferRequest
    described: Mapping[str, Array]
    wanted: frozenset[str]
    deadline_s: float | None
    priority: int
    stream: str
    recurs: bool = False

    @classmethod
    def of(cls, message: pb.ModelInferRequest, raw: Sequence[Buffer], limits: TensorLimits) -> RequestHead:
        """Return the head of ``message``, whose tensors have the raw contents ``raw``, if any.

        Raises:
            InvalidInput: A tensor's header or a parameter is malformed, there are more tensors than ``limits`` let, or
                something is asked for that is not offered.
        """
        if len(message.outputs) > limits.tensors:
            raise InvalidInput.of(f"at most {limits.tensors}", field="outputs", found=len(message.outputs))
        wishes = (extension_faults(one.parameters, f"outputs[{i}]") for i, one in enumerate(message.outputs))
        if faults := tuple(itertools.chain.from_iterable(wishes)):
            raise InvalidInput(faults)
        return cls(
            message=message,
            described=described_inputs(message, limits, raw),
            wanted=frozenset(output.name for output in message.outputs),
            deadline_s=deadline_of(message),
            priority=priority_of(message),
            stream=stream_of(message),
        )


class Fits:
    """Says whether requests fit a model, and remembers it of heads that come again."""

    def __init__(self) -> None:
        self._known: dict[tuple[RequestHead, int], tuple[Loaded, int, int]] = {}  # by head and id of what was loaded

    def items(self, head: RequestHead, loaded: Loaded, max_batch: int) -> int:
        """Return the items of a request for the model ``loaded``, between 1 and ``max_batch``.

        From the head alone: contents that cannot be run are not worth decoding.

        Raises:
            InvalidInput: The model takes no such inputs, or has no such outputs; with every fault of the inputs.
        """
        known = self._known.get((head, id(loaded)))
        if known is not None and known[0] is loaded and known[1] == max_batch:
            return known[2]
        if unknown := head.wanted - {spec.name for spec in loaded.outputs}:
            names = ", ".join(spec.name for spec in loaded.outputs)
            raise InvalidInput.of(f"some of {names}", field="outputs", found=", ".join(sorted(unknown)))
        items = batch_of(head.described, loaded.inputs, max_batch=max_batch, where=head.message.model_name)
        if head.recurs:
            if len(self._known) >= _KNOWN_HEADS:
                self._known.clear()
            self._known[head, id(loaded)] = loaded, max_batch, items
        return items


class HeadReader:
    """Takes serialised requests apart, and remembers their heads.

    Args:
        limits: What one request may hold.
    """

    def __init__(self, limits: TensorLimits) -> None:
        self._limits = limits
        self._known: dict[tuple[bytes, int], RequestHead] = {}

    def read(self, request: bytes | memoryview) -> tuple[RequestHead, list[memoryview]]:
        """Return the head of a serialised ``ModelInferRequest``, and the raw contents as parts of it, not copied.

        Raises:
            InvalidInput: The bytes are no such message, or as for `RequestHead.of`.
        """
        rest, raw = split_fields(request)
        head = self._known.get((rest, len(raw)))
        if head is None:
            head = RequestHead.of(parsed_request(rest), raw, self._limits)
            if raw and len(rest) <= _LONGEST_KNOWN:  # without raw contents the rest holds the tensors
                if len(self._known) >= _KNOWN_HEADS:
                    self._known.clear()
                head = self._known[rest, len(raw)] = dataclasses.replace(head, recurs=True)
        return head, raw
