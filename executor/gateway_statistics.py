"""What agents say of the requests that they had, asked for by a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import grpc

from executor.forwarding import CallFailed
from executor.gateway_switchboard import Switchboard
from executor.proto import open_inference_pb2 as messages

__all__ = ["agents_statistics"]

_FORMER_S = 1.0
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def agents_statistics(
    switchboard: Switchboard, service: str, nodes: Collection[str], timeout_s: float
) -> list[messages.ModelStatisticsResponse]:
    """Return what each agent says of ``service``, or of every service when it is empty.

    Plans move services, and what is counted must not fall: so agents that do not serve it now are asked as well, those
    that the routes do not name any more included, for as long as they answer.

    Args:
        switchboard: Of the gateway.
        service: Its name, or an empty text.
        nodes: Where it is served now. Of these, some agent must answer.
        timeout_s: How long agents may take.

    Raises:
        CallFailed: No agent of ``nodes`` answers.
    """
    ask = messages.ModelStatisticsRequest(name=service).SerializeToString()
    serving = [peer for node, peer in switchboard.peers.items() if node in nodes]
    serving = [peer for peer in serving if peer.answers] or serving
    others = [peer for node, peer in switchboard.peers.items() if node not in nodes and peer.answers]
    former = dict(switchboard.former)
    found = await asyncio.gather(
        *(peer.call("ModelStatistics", ask, "", timeout_s) for peer in (*serving, *others)),
        *(peer.call("ModelStatistics", ask, "", min(timeout_s, _FORMER_S)) for peer in former.values()),
        return_exceptions=True,
    )
    failures = [one for one in found if isinstance(one, BaseException)]
    unexpected = [one for one in failures if not isinstance(one, CallFailed)]
    of_serving = [one for one in found[: len(serving)] if isinstance(one, BaseException)]
    if unexpected or (of_serving and len(of_serving) == len(serving)):
        raise (unexpected or of_serving)[0]
    for node, one in zip(former, found[len(found) - len(former) :], strict=True):
        if isinstance(one, CallFailed) and one.code in _GONE:
            switchboard.forget(node)
    return [messages.ModelStatisticsResponse.FromString(one) for one in found if isinstance(one, bytes)]
