"""kill -9 of the controller at every step of an apply: requests go on, and the next apply goes on from there."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from executor.controller import Applied, NoChanges, apply, status
from executor.load import replay
from plans.service import Services
from tests.executor.controller_process import doomed_apply
from tests.executor.peer_process import PeerProcess, cluster_of, processes
from tests.executor.placements import placement
from traces.table import RequestTrace

SERVICES = Services.model_validate(
    {"services": [{"name": "chat", "slo": {"deadline": "10s"}, "variants": [{"model": "fake-double"}]}]}
)
ONE = placement({"a/0": {"chat": "fake-double"}, "b/0": {"chat": "fake-double"}})
OTHER = placement({"a/1": {"chat": "fake-double"}, "b/1": {"chat": "fake-double"}})
OFTEN = [("stage", "done"), ("commit", "begun"), ("commit", "done"), ("route", "done"), ("finish", "begun")]
STEPS = [
    pytest.param((step, outcome), id=f"{step}-{outcome}", marks=[] if (step, outcome) in OFTEN else pytest.mark.slow)
    for step in ("validate", "stage", "commit", "route", "finish")
    for outcome in ("begun", "done")
]


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[PeerProcess], PeerProcess]]:
    folder = tmp_path_factory.mktemp("killed")
    agents = [PeerProcess("agent", folder / node, node=node) for node in "ab"]
    gateway = PeerProcess("gateway", folder / "g")
    with processes(*agents, gateway):
        yield folder, agents, gateway


@pytest.mark.parametrize("at", STEPS)
def test_the_next_apply_goes_on_and_no_request_is_lost(
    peers: tuple[Path, list[PeerProcess], PeerProcess], at: tuple[str, str]
) -> None:
    folder, agents, gateway = peers
    cluster = cluster_of(*agents)
    live = asyncio.run(status(cluster, [gateway.address])).live
    before, after = (OTHER, ONE) if live is not None and live.digest == OTHER.placement_digest else (ONE, OTHER)
    asyncio.run(apply(before, cluster, [gateway.address], prior=live))
    assert doomed_apply(folder, after, before.placement_digest, agents, gateway, at) == -signal.SIGKILL
    arrivals = RequestTrace(pd.DataFrame({"arrival_s": np.arange(30) / 100.0, "service": "chat"}))

    async def loaded_apply() -> tuple[Any, Any]:
        """Apply again, while requests come in."""
        known = (await status(cluster, [gateway.address])).live
        return await asyncio.gather(
            replay(arrivals, gateway.address, SERVICES), apply(after, cluster, [gateway.address], prior=known)
        )

    result, applied = asyncio.run(loaded_apply())
    assert set(result.requests["outcome"]) == {"good"}
    assert isinstance(applied, Applied | NoChanges)
    found = asyncio.run(status(cluster, [gateway.address]))
    assert found.live is not None
    assert found.live.digest == after.placement_digest
    assert {replica.group for replica in found.replicas} == {group.id for group in after.groups}
    assert not any(replica.problem for replica in found.replicas)
