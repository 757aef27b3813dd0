"""What can go wrong between a client, an agent and its workers, and the gRPC status that says so.

Under `plans.errors.ForeplanError`::

    RequestRefused             a request for inference gets no result
    ├── UnknownService         nothing of that name runs here
    ├── Hopeless               its deadline cannot be met any more
    ├── Displaced              it gave way to a full batch that waits behind it
    ├── QueueFull              too many requests, or too many bytes, wait already
    ├── ReplicaUnavailable     the replica is loading, draining, or lost its worker: another one may serve
    └── ModelFailed            the model raised an error of its own
    WrongGeneration            a control call is older than what was seen, or does not follow on it
    LeaseHeld                  another controller is changing the node
    RoutesRefused              with new routes a service would go out that is served now
    PlacementIsPlanned         placement changes through `foreplan apply` only
    StateNotStored             the state folder cannot be written, so nothing was changed
    StageFailed                something that a plan needs could not be loaded; nothing was committed
    WorkerGone                 the worker process ended, or could not be started
    WorkerRefused              the worker says why it could not do what it was asked
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from plans.errors import BadStoredData, ForeplanError, InvalidInput, RemoteFailure

__all__ = [
    "TOO_MUCH",
    "Displaced",
    "Hopeless",
    "LeaseHeld",
    "ModelFailed",
    "PlacementIsPlanned",
    "QueueFull",
    "ReplicaUnavailable",
    "RequestRefused",
    "RoutesRefused",
    "STATUS",
    "StageFailed",
    "StateNotStored",
    "UnknownService",
    "WorkerGone",
    "WorkerRefused",
    "WrongGeneration",
    "details_of",
    "request_error",
    "shortened",
    "status_of",
]

_DETAILS_BYTES = 2000
"""Of a message; what is not ASCII takes three times its bytes on the way. Clients refuse headers of 8 to 16 KiB."""


class RequestRefused(ForeplanError):
    """A request for inference gets no result."""


class UnknownService(RequestRefused):
    """Nothing of that name runs here."""


class Hopeless(RequestRefused):
    """The request's deadline cannot be met any more."""


class Displaced(RequestRefused):
    """The request could only be met by a small batch while more than a full one waits behind it."""


TOO_MUCH = "send less, give it more time, or plan more replicas"
"""What a client that is refused for want of capacity can do."""


class QueueFull(RequestRefused):
    """Too many requests, or too many bytes of them, wait already."""


class ReplicaUnavailable(RequestRefused):
    """The replica does not take requests now; another one may."""


class ModelFailed(RequestRefused):
    """The model raised an error of its own."""


class WrongGeneration(ForeplanError):
    """A control call is older than what was seen, or does not follow on it."""


class LeaseHeld(ForeplanError):
    """Another controller is changing the node."""


class RoutesRefused(ForeplanError):
    """With new routes a service would go out that is served now: the old ones stay."""


class PlacementIsPlanned(ForeplanError):
    """A client asked for a change that only a plan can make."""


class StageFailed(ForeplanError):
    """Something that a plan needs could not be loaded."""


class StateNotStored(ForeplanError):
    """The state folder cannot be written, so nothing was changed."""


class WorkerGone(ForeplanError):
    """The worker process ended, or could not be started."""


class WorkerRefused(ForeplanError):
    """The worker could not do what it was asked.

    Attributes:
        invalid_input: Whether the fault lies with what was sent, not with the worker or its model.
    """

    def __init__(self, problem: str, *, invalid_input: bool = False) -> None:
        self.invalid_input = invalid_input
        super().__init__(problem)


STATUS: Mapping[type[ForeplanError], grpc.StatusCode] = {
    UnknownService: grpc.StatusCode.NOT_FOUND,
    Hopeless: grpc.StatusCode.DEADLINE_EXCEEDED,
    Displaced: grpc.StatusCode.RESOURCE_EXHAUSTED,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ReplicaUnavailable: grpc.StatusCode.UNAVAILABLE,
    ModelFailed: grpc.StatusCode.INTERNAL,
    RequestRefused: grpc.StatusCode.UNAVAILABLE,
    WrongGeneration: grpc.StatusCode.FAILED_PRECONDITION,
    LeaseHeld: grpc.StatusCode.FAILED_PRECONDITION,
    RoutesRefused: grpc.StatusCode.FAILED_PRECONDITION,
    PlacementIsPlanned: grpc.StatusCode.FAILED_PRECONDITION,
    StageFailed: grpc.StatusCode.ABORTED,
    StateNotStored: grpc.StatusCode.INTERNAL,
    WorkerGone: grpc.StatusCode.UNAVAILABLE,
    WorkerRefused: grpc.StatusCode.INTERNAL,
    InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    RemoteFailure: grpc.StatusCode.UNAVAILABLE,
    BadStoredData: grpc.StatusCode.DATA_LOSS,
    ForeplanError: grpc.StatusCode.INTERNAL,
}
"""The gRPC status of every error; an error without an entry of its own has that of its nearest ancestor."""


def status_of(error: ForeplanError) -> grpc.StatusCode:
    """Return the gRPC status that tells a client of ``error``."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def details_of(error: ForeplanError) -> str:
    """Return the message of ``error``, `shortened`."""
    return shortened(str(error))


def shortened(details: str) -> str:
    """Return a message as gRPC can carry it: trailers are headers, and with long ones the status is lost too."""
    data = details.encode(errors="replace")
    if len(data) <= _DETAILS_BYTES:
        return details
    return f"{data[: _DETAILS_BYTES - 2].decode(errors='ignore')} …"


def request_error(replica: str, error: BaseException) -> ForeplanError:
    """Return what a client is told whose work on ``replica`` ended with ``error``."""
    if isinstance(error, WorkerRefused):
        if error.invalid_input:
            return InvalidInput.of("inputs that the model takes", where=replica, field="inputs", found=str(error))
        return ModelFailed(f"{replica}: {error}")
    return ReplicaUnavailable(f"{replica}: {error}")
