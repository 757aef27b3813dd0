"""What a user is told of peers that do not tell their state."""

from __future__ import annotations

import asyncio

import pytest

from executor.cluster_connection import ClusterConnection, unheard
from executor.control_client import TimedOut, Unreachable
from plans.cluster import Cluster
from plans.errors import RemoteFailure
from tests.free_port import free_port

GATE = "10.0.0.9:8001"
START_AGENT = "start the agent (`foreplan agent` on its node), or take its node out of the cluster file"
START_GATEWAY = "start the gateway (`foreplan gateway`), or leave it out of the command"
AWAY = Unreachable("peer", "UNAVAILABLE: gone", retryable=True)
SLOW = TimedOut("peer", "DEADLINE_EXCEEDED: not done", retryable=True)
ASKS = RemoteFailure("peer", "UNAVAILABLE: Socket closed (it may ask for a certificate)", retryable=True)


@pytest.mark.parametrize(
    ("lost", "remedy"),
    [
        ({"a": AWAY}, f": {START_AGENT}"),
        ({GATE: AWAY}, f": {START_GATEWAY}"),
        ({"a": AWAY, GATE: AWAY}, f": {START_AGENT}; {START_GATEWAY}"),
        ({"a": SLOW, GATE: SLOW}, ": be patient"),
        ({"a": AWAY, "b": SLOW}, f": {START_AGENT}; be patient"),
        ({"a": ASKS, GATE: ASKS}, ""),
    ],
)
def test_remedies_are_those_of_what_is_wrong(lost: dict[str, RemoteFailure], remedy: str) -> None:
    assert unheard(lost, [GATE], longer="be patient").problem.endswith(f"; nothing was changed{remedy}")


def test_peers_that_do_not_run_are_unreachable_and_called_so_once() -> None:
    node, gateway = (f"127.0.0.1:{free_port()}" for _ in range(2))
    here = {"name": "a", "address": node, "gpus": {"type": "cpu", "count": 1}}
    cluster = Cluster.model_validate({"gpu_types": {"cpu": {"memory": "1GiB"}}, "nodes": [here]})

    async def lost() -> dict[str, RemoteFailure]:
        async with ClusterConnection(cluster, [gateway]) as connection:
            return (await connection.states(timeout_s=30.0))[2]

    found = asyncio.run(lost())
    assert {name: type(failure) for name, failure in found.items()} == {"a": Unreachable, gateway: Unreachable}
    assert str(found["a"]) == f"agent of a at {node}: UNAVAILABLE: Failed to connect to remote host: Connection refused"
