"""The front door's control plane: ``foreplan.control.v1.Gateway``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from executor import wire
from executor.errors import RoutesRefused, StateNotStored, details_of, status_of
from executor.proto import control_pb2, control_pb2_grpc
from executor.state import GatewayState, RoutingTable
from plans.errors import InvalidInput, RemoteFailure, StalePlan

__all__ = ["GatewayControl"]

_Context = grpc.aio.ServicerContext


class GatewayControl(control_pb2_grpc.GatewayServicer):
    """Reports the routes in force with the health of their targets, and takes new ones.

    Args:
        install: Puts a table in force.
        state: Returns the state to report.
    """

    def __init__(
        self,
        install: Callable[[RoutingTable], Awaitable[None]],
        state: Callable[[], Awaitable[GatewayState]],
    ) -> None:
        self._install = install
        self._state = state

    async def GetState(  # noqa: N802 - the protocol's name
        self, _: control_pb2.GetStateRequest, __: _Context[Any, Any]
    ) -> control_pb2.GatewayState:
        """Report the table in force and its targets."""
        return wire.gateway_state_to_proto(await self._state())

    async def SetRoutes(  # noqa: N802 - the protocol's name
        self, request: control_pb2.RoutingTable, context: _Context[Any, Any]
    ) -> control_pb2.GenerationResponse:
        """Put a table in force, all at once; refuse one that is older than the one in force, or contradicts itself."""
        try:
            table = wire.routing_table_from_proto(request)
            await self._install(table)
        except InvalidInput as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, details_of(error))
        except StalePlan as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, details_of(error))
        except (RoutesRefused, StateNotStored) as error:
            await context.abort(status_of(error), details_of(error))
        except RemoteFailure as error:
            code = grpc.StatusCode.UNAVAILABLE if error.retryable else grpc.StatusCode.FAILED_PRECONDITION
            await context.abort(code, details_of(error))
        return control_pb2.GenerationResponse(generation=table.generation)
