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

from executor.controller import Applied, NoChanges, ProgressEvent, apply, status
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


WAVES = [
    pytest.param(("commit", "done"), 3, 2, id="while-agents-commit-the-second-wave"),
    pytest.param(("finish", "begun"), 1, 2, id="before-the-first-wave-ends"),
    pytest.param(("stage", "begun"), 3, 2, id="before-the-second-wave"),
    pytest.param(("route", "done"), 2, 1, id="when-the-second-wave-has-flipped"),
    pytest.param(("finish", "begun"), 3, 1, id="before-the-second-wave-ends", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("at", "count", "further"), WAVES)
def test_the_next_apply_goes_on_wave_by_wave(
    peers: tuple[Path, list[PeerProcess], PeerProcess], at: tuple[str, str], count: int, further: int
) -> None:
    """Every device is full. The next apply knows no plan but its own: agents say what they have committed."""
    folder, agents, gateway = peers
    cluster = cluster_of(*agents)
    before, after = (
        placement({group: {"chat": variant} for group in ("a/0", "b/0", "b/1")}, memory_bytes=700 * 2**20)
        for variant in ("fake-slow-20", "fake-double")
    )
    asyncio.run(apply(before, cluster, [gateway.address], prior=asyncio.run(status(cluster, [gateway.address])).live))
    assert doomed_apply(folder, after, before.placement_digest, agents, gateway, at, count) == -signal.SIGKILL
    assert not asyncio.run(status(cluster, [gateway.address])).healthy
    arrivals = RequestTrace(pd.DataFrame({"arrival_s": np.arange(60) / 60.0, "service": "chat"}))
    commits: list[str] = []

    def progress(event: ProgressEvent) -> None:
        if (event.step, event.outcome, event.peer) == ("commit", "done", "a"):
            commits.append(event.step)

    async def loaded_apply() -> Any:
        loading = replay(arrivals, gateway.address, SERVICES)
        result, _ = await asyncio.gather(loading, apply(after, cluster, [gateway.address], progress=progress))
        return result

    result = asyncio.run(loaded_apply())
    assert set(result.requests["outcome"]) == {"good"}
    assert len(commits) == further
    found = asyncio.run(status(cluster, [gateway.address]))
    assert [(one.group, one.variant) for one in found.replicas] == [(g, "fake-double") for g in ("a/0", "b/0", "b/1")]
    assert not any(one.problem for one in (*found.replicas, *found.agents, *found.gateways))
