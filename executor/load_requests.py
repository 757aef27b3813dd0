"""The requests that a load client sends: one per service, built once from what the service says of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

from executor.control_client import remote_failure
from executor.gateway_peer import INFERENCE
from executor.proto import open_inference_pb2 as messages
from executor.runtime.protocol import NUMPY_TYPES
from executor.stream_inference import INPUT
from executor.tensors import encode_request
from plans.errors import InvalidInput, RemoteFailure

__all__ = ["Arrays", "Bodies", "build_requests", "example_inputs", "parameter_field"]

Arrays = Mapping[str, NDArray[Any]]

_ASK_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bodies:
    """Serialised requests by service, and which of the services generate: those of these name the service only."""

    requests: Mapping[str, bytes]
    generating: frozenset[str]


async def build_requests(
    channel: grpc.aio.Channel, gateway: str, services: tuple[str, ...], *, payloads: Mapping[str, Arrays], seed: int
) -> Bodies:
    """Return a serialised ``ModelInferRequest`` for each service.

    A service that the gateway does not know gets a request without inputs: it is offered all the same, and refused.

    Args:
        channel: To the gateway.
        gateway: Its address, for errors.
        services: Names of services and workflows to ask for.
        payloads: Input arrays by service, in place of random ones.
        seed: Of the random inputs; together with the service's name it determines them.

    Raises:
        RemoteFailure: The gateway cannot be reached, or a service cannot say what it takes.
        InvalidInput: A service takes a datatype that has no random values here.
    """
    live = channel.unary_unary(
        f"/{INFERENCE}/ServerLive",
        messages.ServerLiveRequest.SerializeToString,
        messages.ServerLiveResponse.FromString,
    )
    try:
        await live(messages.ServerLiveRequest(), timeout=_ASK_S)
    except grpc.aio.AioRpcError as error:
        failure = remote_failure(gateway, error)
        if error.code() is grpc.StatusCode.PERMISSION_DENIED:
            raise RemoteFailure(gateway, f"{failure.problem}; a client's will do", retryable=False) from error
        problem = f"the gateway cannot be reached ({failure.problem}); start `foreplan gateway` or correct the address"
        raise RemoteFailure(gateway, problem, retryable=True) from error
    requests = {}
    generating = set()
    for position, service in enumerate(services):
        inputs = payloads.get(service)
        if inputs is None:
            metadata = await _metadata(channel, gateway, service)
            if metadata is not None and _takes_tokens(metadata):
                generating.add(service)
                metadata = None
            inputs = example_inputs(metadata, seed=seed + position) if metadata else {}
        requests[service] = encode_request(service, inputs).SerializeToString()
    return Bodies(requests=requests, generating=frozenset(generating))


def parameter_field(name: str, value: int) -> bytes:
    """Return what, behind a serialised request, adds the parameter ``name`` to it."""
    field: bytes = encode_request("", {}, parameters={name: value}).SerializeToString()
    return field


def _takes_tokens(metadata: messages.ModelMetadataResponse) -> bool:
    """Say whether a service takes prompts of any length."""
    return [(tensor.name, list(tensor.shape)) for tensor in metadata.inputs] == [(INPUT, [1, -1])]


async def _metadata(channel: grpc.aio.Channel, gateway: str, service: str) -> messages.ModelMetadataResponse | None:
    """Ask what ``service`` takes; None when the plan in force does not have it."""
    ask = channel.unary_unary(
        f"/{INFERENCE}/ModelMetadata",
        messages.ModelMetadataRequest.SerializeToString,
        messages.ModelMetadataResponse.FromString,
    )
    try:
        answer: messages.ModelMetadataResponse = await ask(messages.ModelMetadataRequest(name=service), timeout=_ASK_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return None
        failure = remote_failure(gateway, error)
        problem = f"service {service!r} does not say what it takes: {failure.problem}"
        raise RemoteFailure(gateway, problem, retryable=failure.retryable) from error
    return answer


def example_inputs(metadata: messages.ModelMetadataResponse, *, seed: int) -> dict[str, NDArray[Any]]:
    """Return random inputs of the right datatypes and shapes; a dimension of any size becomes 1.

    Floats are normal with mean 0 and deviation 1; integers are 0 or 1, so that they are valid as indices and masks.

    Raises:
        InvalidInput: A datatype has no NumPy equivalent.
    """
    generator = np.random.default_rng(seed)
    inputs: dict[str, NDArray[Any]] = {}
    for tensor in metadata.inputs:
        kind = NUMPY_TYPES.get(tensor.datatype)
        if kind is None:
            field = f"inputs[{tensor.name}].datatype"
            expected = f"one of {', '.join(NUMPY_TYPES)}; give a payload for other types"
            raise InvalidInput.of(expected, where=metadata.name, field=field, found=tensor.datatype)
        shape = [max(size, 1) for size in tensor.shape]
        if kind.kind == "f":
            inputs[tensor.name] = generator.standard_normal(shape).astype(kind)
        else:
            inputs[tensor.name] = generator.integers(0, 2, shape).astype(kind)
    return inputs
