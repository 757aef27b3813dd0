"""What an agent and a worker say to each other: inner types to frames of ``foreplan.worker.v1`` and back.

A frame is a length (four bytes, little endian), a head and a protobuf message. The one module that reads or builds
messages of that package. Tensors do not travel here; a `TensorPlace` says where in shared memory one lies.

What differs between two batches of one size in one place is in the head, so their messages are equal. They are built
and read once and remembered: a worker has slept before most batches, and then a look-up takes microseconds where code
that left the processor's caches takes a tenth of a millisecond.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from google.protobuf.message import DecodeError

from executor.proto import worker_pb2 as pb
from executor.runtime.protocol import GenerationFacts, TensorSpec

__all__ = [
    "Done",
    "Failed",
    "FrameError",
    "FrameSplitter",
    "Freed",
    "FromWorker",
    "Iterate",
    "Iterated",
    "Load",
    "Loaded",
    "Ready",
    "Run",
    "Stop",
    "TensorPlace",
    "ToWorker",
    "Unload",
    "Unloaded",
    "decode_from_worker",
    "decode_to_worker",
    "encode_from_worker",
    "encode_to_worker",
]

MAX_FRAME_BYTES = 4 * 2**20
"""Longest frame; messages name places of tensors and are far below it."""

_LONGEST_PROBLEM = 1 << 16
"""Characters of a problem that are told: what a model raises may be as long as its tensors."""

_LENGTH = struct.Struct("<I")
_HEAD = struct.Struct("<BQdd")  # kind, and of a batch: number of the call, seconds run, seconds waited for its model
_OTHER, _BATCH = 0, 1
_KNOWN = 1024

_Message = TypeVar("_Message")


class FrameError(Exception):
    """The other side sent bytes that are no frame of this protocol."""


class TensorPlace(NamedTuple):
    """A tensor in shared memory: ``size_bytes`` bytes from ``offset_bytes``, row major. A key of what is remembered."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Load ``variant`` for batches up to ``max_batch``; a variant that is loaded already is replaced.

    ``shape`` is tensor and pipeline parallelism over the worker's devices. ``kv_bytes`` is key-value memory to set
    aside where the model generates; 0 when it shall not.
    """

    call: int
    variant: str
    max_batch: int
    shape: tuple[int, int] = (1, 1)
    kv_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload:
    """Forget ``variant``."""

    call: int
    variant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Run one batch; outputs go to ``output_offset_bytes``, at most ``output_capacity_bytes`` of them."""

    call: int
    variant: str
    inputs: tuple[TensorPlace, ...]
    output_offset_bytes: int
    output_capacity_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Iterate:
    """Run one iteration of a model that generates: a prefill, or one token more for each sequence of ``decode``.

    Attributes:
        call: Number of the call.
        variant: The model.
        kv_tokens: Key-value memory that its sequences may take together.
        freed: Sequences that are over; their memory is free before the iteration.
        prefill: Sequences that begin, with all tokens so far, in the order of their admission.
        decode: Sequences that go on, in that order.
    """

    call: int
    variant: str
    kv_tokens: int
    freed: tuple[int, ...] = ()
    prefill: tuple[tuple[int, tuple[int, ...]], ...] = ()
    decode: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Finish what runs, and end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The runtime is up and knows ``variants``."""

    process: int
    variants: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Answer to `Load`; see `executor.runtime.protocol.LoadedModel` for the figures.

    ``generates`` says what the model takes where it was loaded with key-value memory and can generate.
    """

    call: int
    weight_bytes: int
    load_s: float
    first_inference_s: float
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    generates: GenerationFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Iterated:
    """Answer to `Iterate`: a token for each of its sequences, in their order."""

    call: int
    tokens: tuple[int, ...]
    run_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Answer to `Run`; before it ran, the batch waited ``swap_s`` seconds for its model to be brought to the device."""

    call: int
    outputs: tuple[TensorPlace, ...]
    run_s: float
    swap_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Freed:
    """The batch of a `Run` has left the first stage: the next one may come, and its inputs are not needed any more."""

    call: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unloaded:
    """Answer to `Unload`."""

    call: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Answer to any call that could not be done; call 0 is the start of the runtime."""

    call: int
    problem: str
    invalid_input: bool = False


ToWorker = Load | Unload | Run | Iterate | Stop
FromWorker = Ready | Loaded | Done | Iterated | Freed | Unloaded | Failed


def encode_to_worker(message: ToWorker) -> bytes:
    """Return the frame for a message to a worker."""
    match message:
        case Load():
            body = pb.ToWorker(
                load=pb.ToWorker.Load(
                    call=message.call,
                    variant=message.variant,
                    max_batch=message.max_batch,
                    tensor_parallel=message.shape[0],
                    pipeline_parallel=message.shape[1],
                    kv_bytes=message.kv_bytes,
                )
            )
        case Unload():
            body = pb.ToWorker(unload=pb.ToWorker.Unload(call=message.call, variant=message.variant))
        case Run():
            places = message.inputs, message.output_offset_bytes, message.output_capacity_bytes
            return _frame(_run_message(message.variant, *places), _BATCH, message.call)
        case Iterate():
            body = pb.ToWorker(
                iterate=pb.ToWorker.Iterate(
                    call=message.call,
                    variant=message.variant,
                    kv_tokens=message.kv_tokens,
                    freed=message.freed,
                    prefill=[pb.ToWorker.Context(sequence=number, tokens=tokens) for number, tokens in message.prefill],
                    decode=message.decode,
                )
            )
        case Stop():
            body = pb.ToWorker(stop=pb.ToWorker.Stop())
    return _frame(body.SerializeToString())


def decode_to_worker(body: bytes) -> ToWorker:
    """Return the message to a worker in a frame's body.

    Raises:
        FrameError: It is none.
    """
    kind, call, _, _ = _head_of(body)
    if kind == _BATCH:
        variant, inputs, offset_bytes, capacity_bytes = _read_run(body[_HEAD.size :])
        return Run(
            call=call,
            variant=variant,
            inputs=inputs,
            output_offset_bytes=offset_bytes,
            output_capacity_bytes=capacity_bytes,
        )
    message = _parsed(pb.ToWorker.FromString, body[_HEAD.size :])
    match message.WhichOneof("message"):
        case "load":
            load = message.load
            shape = (load.tensor_parallel, load.pipeline_parallel)
            return Load(
                call=load.call, variant=load.variant, max_batch=load.max_batch, shape=shape, kv_bytes=load.kv_bytes
            )
        case "unload":
            return Unload(call=message.unload.call, variant=message.unload.variant)
        case "iterate":
            iterate = message.iterate
            return Iterate(
                call=iterate.call,
                variant=iterate.variant,
                kv_tokens=iterate.kv_tokens,
                freed=tuple(iterate.freed),
                prefill=tuple((context.sequence, tuple(context.tokens)) for context in iterate.prefill),
                decode=tuple(iterate.decode),
            )
        case "stop":
            return Stop()
        case other:
            raise FrameError(f"a message to a worker without content: {other}")


def encode_from_worker(message: FromWorker) -> bytes:
    """Return the frame for a message from a worker."""
    match message:
        case Ready():
            body = pb.FromWorker(ready=pb.FromWorker.Ready(process=message.process, variants=message.variants))
        case Loaded():
            body = pb.FromWorker(
                loaded=pb.FromWorker.Loaded(
                    call=message.call,
                    weight_bytes=message.weight_bytes,
                    load_s=message.load_s,
                    first_inference_s=message.first_inference_s,
                    inputs=[_spec_to_proto(spec) for spec in message.inputs],
                    outputs=[_spec_to_proto(spec) for spec in message.outputs],
                    generates=_facts_to_proto(message.generates) if message.generates else None,
                )
            )
        case Iterated():
            body = pb.FromWorker(
                iterated=pb.FromWorker.Iterated(call=message.call, tokens=message.tokens, run_s=message.run_s)
            )
        case Done():
            return _frame(_done_message(message.outputs), _BATCH, message.call, message.run_s, message.swap_s)
        case Freed():
            body = pb.FromWorker(freed=pb.FromWorker.Freed(call=message.call))
        case Unloaded():
            body = pb.FromWorker(unloaded=pb.FromWorker.Unloaded(call=message.call))
        case Failed():
            body = pb.FromWorker(
                failed=pb.FromWorker.Failed(
                    call=message.call, problem=_told(message.problem), invalid_input=message.invalid_input
                )
            )
    return _frame(body.SerializeToString())


def decode_from_worker(body: bytes) -> FromWorker:
    """Return the message from a worker in a frame's body.

    Raises:
        FrameError: It is none.
    """
    kind, call, run_s, swap_s = _head_of(body)
    if kind == _BATCH:
        return Done(call=call, outputs=_read_done(body[_HEAD.size :]), run_s=run_s, swap_s=swap_s)
    message = _parsed(pb.FromWorker.FromString, body[_HEAD.size :])
    match message.WhichOneof("message"):
        case "ready":
            return Ready(process=message.ready.process, variants=tuple(message.ready.variants))
        case "loaded":
            loaded = message.loaded
            return Loaded(
                call=loaded.call,
                weight_bytes=loaded.weight_bytes,
                load_s=loaded.load_s,
                first_inference_s=loaded.first_inference_s,
                inputs=tuple(_spec_from_proto(spec) for spec in loaded.inputs),
                outputs=tuple(_spec_from_proto(spec) for spec in loaded.outputs),
                generates=_facts_from_proto(loaded.generates) if loaded.HasField("generates") else None,
            )
        case "iterated":
            iterated = message.iterated
            return Iterated(call=iterated.call, tokens=tuple(iterated.tokens), run_s=iterated.run_s)
        case "freed":
            return Freed(call=message.freed.call)
        case "unloaded":
            return Unloaded(call=message.unloaded.call)
        case "failed":
            failed = message.failed
            return Failed(call=failed.call, problem=failed.problem, invalid_input=failed.invalid_input)
        case other:
            raise FrameError(f"a message from a worker without content: {other}")


class FrameSplitter:
    """Cuts a stream of bytes into the bodies of frames."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes of the stream and return the bodies that are complete now.

        Raises:
            FrameError: A frame is longer than `MAX_FRAME_BYTES`.
        """
        if not self._held and len(data) >= _LENGTH.size and len(data) - _LENGTH.size == _LENGTH.unpack_from(data)[0]:
            return [data[_LENGTH.size :]]  # one whole frame, which most reads bring
        self._held += data
        bodies = []
        start = 0
        while len(self._held) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._held, start)
            if length > MAX_FRAME_BYTES:
                raise FrameError(f"a frame of {length} bytes, more than {MAX_FRAME_BYTES}")
            end = start + _LENGTH.size + length
            if len(self._held) < end:
                break
            bodies.append(bytes(self._held[start + _LENGTH.size : end]))
            start = end
        del self._held[:start]
        return bodies


def _told(problem: str) -> str:
    """Return what can be told of a problem: not all of a long one, and nothing that is no character."""
    return problem[:_LONGEST_PROBLEM].encode(errors="replace").decode()


def _frame(message: bytes, kind: int = _OTHER, call: int = 0, run_s: float = 0.0, swap_s: float = 0.0) -> bytes:
    return _LENGTH.pack(_HEAD.size + len(message)) + _HEAD.pack(kind, call, run_s, swap_s) + message


def _head_of(body: bytes) -> tuple[int, int, float, float]:
    try:
        kind, call, run_s, swap_s = _HEAD.unpack_from(body)
    except struct.error as error:
        raise FrameError(str(error)) from error
    return kind, call, run_s, swap_s


@functools.lru_cache(_KNOWN)
def _run_message(variant: str, inputs: tuple[TensorPlace, ...], offset_bytes: int, capacity_bytes: int) -> bytes:
    message = pb.ToWorker.Run(
        variant=variant,
        inputs=[_place_to_proto(place) for place in inputs],
        output_offset=offset_bytes,
        output_capacity=capacity_bytes,
    )
    return message.SerializeToString()


@functools.lru_cache(_KNOWN)
def _read_run(message: bytes) -> tuple[str, tuple[TensorPlace, ...], int, int]:
    run = _parsed(pb.ToWorker.Run.FromString, message)
    inputs = tuple(_place_from_proto(place) for place in run.inputs)
    return run.variant, inputs, run.output_offset, run.output_capacity


@functools.lru_cache(_KNOWN)
def _done_message(outputs: tuple[TensorPlace, ...]) -> bytes:
    return pb.FromWorker.Done(outputs=[_place_to_proto(place) for place in outputs]).SerializeToString()


@functools.lru_cache(_KNOWN)
def _read_done(message: bytes) -> tuple[TensorPlace, ...]:
    return tuple(_place_from_proto(place) for place in _parsed(pb.FromWorker.Done.FromString, message).outputs)


def _parsed(parse: Callable[[bytes], _Message], body: bytes) -> _Message:
    try:
        return parse(body)
    except DecodeError as error:
        raise FrameError(str(error)) from error


def _place_to_proto(place: TensorPlace) -> pb.TensorRef:
    return pb.TensorRef(
        name=place.name,
        datatype=place.datatype,
        shape=place.shape,
        offset=place.offset_bytes,
        size=place.size_bytes,
    )


def _place_from_proto(message: pb.TensorRef) -> TensorPlace:
    return TensorPlace(
        name=message.name,
        datatype=message.datatype,
        shape=tuple(message.shape),
        offset_bytes=message.offset,
        size_bytes=message.size,
    )


def _facts_to_proto(facts: GenerationFacts) -> pb.FromWorker.Vocabulary:
    return pb.FromWorker.Vocabulary(
        tokens=facts.vocabulary,
        max_context=facts.max_context,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        stop_tokens=facts.stop_tokens,
    )


def _facts_from_proto(message: pb.FromWorker.Vocabulary) -> GenerationFacts:
    return GenerationFacts(
        vocabulary=message.tokens,
        max_context=message.max_context,
        kv_bytes_per_token=message.kv_bytes_per_token,
        stop_tokens=tuple(message.stop_tokens),
    )


def _spec_to_proto(spec: TensorSpec) -> pb.FromWorker.TensorSpec:
    return pb.FromWorker.TensorSpec(name=spec.name, datatype=spec.datatype, shape=spec.shape)


def _spec_from_proto(message: pb.FromWorker.TensorSpec) -> TensorSpec:
    return TensorSpec(name=message.name, datatype=message.datatype, shape=tuple(message.shape))
