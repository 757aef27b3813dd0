"""Three fake agents and two fake gateways, and applies to them: for tests of the controller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc
import pytest

from executor.controller import ApplyTimeouts, apply
from executor.state import Phase
from plans.cluster import Cluster
from plans.plan import Plan
from tests.executor.fake_agent import FakeAgent, FakeGateway
from tests.executor.placements import placement

Code = grpc.StatusCode
QUICK = ApplyTimeouts(state_s=2.0, abort_s=0.25, converge_s=0.25)
NODES = ("a", "b", "c")


def plan(groups: dict[str, str], *, prior: Plan | None = None) -> Plan:
    """A plan that runs one service: group to variant."""
    return placement({group: {"chat": variant} for group, variant in groups.items()}, prior=prior, max_batch=1)


FIRST = plan({"a/0": "v1", "b/0": "v1"})
SECOND = plan({"a/0": "v2", "b/0": "v1", "b/1": "v2"}, prior=FIRST)


class Site(NamedTuple):
    """Three fake agents and two fake gateways, with the cluster document that names them."""

    agents: dict[str, FakeAgent]
    gateways: list[FakeGateway]

    @property
    def cluster(self) -> Cluster:
        return Cluster.model_validate(
            {
                "gpu_types": {"cpu": {"memory": "1GiB"}},
                "nodes": [
                    {"name": name, "address": agent.address, "gpus": {"type": "cpu", "count": 2}}
                    for name, agent in self.agents.items()
                ],
            }
        )

    async def apply(self, wanted: Plan, **options: Any) -> Any:
        addresses = [gateway.address for gateway in self.gateways]
        return await apply(wanted, self.cluster, addresses, **({"timeouts": QUICK} | options))

    @property
    def generations(self) -> set[int]:
        return {peer.generation for peer in (*self.agents.values(), *self.gateways)}

    def running(self, node: str) -> dict[str, Phase]:
        return {f"{key.group} {key.variant}": phase for key, phase in self.agents[node].phases.items()}

    def routed(self) -> list[set[str]]:
        """Groups that each gateway routes to, after checking that its weights sum to 1."""
        found = []
        for gateway in self.gateways:
            services = gateway.table.services if gateway.table else ()
            for routes in services:
                assert sum(target.weight for target in routes.targets) == pytest.approx(1.0)
            found.append({target.group for routes in services for target in routes.targets})
        return found

    def assert_runs(self, wanted: Plan, generation: int) -> None:
        """Everything, everywhere, is as ``wanted`` says, and nothing else is left."""
        assert self.generations == {generation}
        for node, agent in self.agents.items():
            expected = {
                f"{group.id} {entry.variant}": Phase.SERVING
                for group in wanted.groups
                if group.node == node
                for entry in group.loadout
            }
            assert self.running(node) == expected
            assert agent.staged is None
        assert self.routed() == [{group.id for group in wanted.groups}] * len(self.gateways)


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    made = Site(
        {name: await FakeAgent(name).start() for name in NODES}, [await FakeGateway().start() for _ in range(2)]
    )
    try:
        yield made
    finally:
        await asyncio.gather(*(peer.kill() for peer in (*made.agents.values(), *made.gateways)))


def run(scenario: Callable[[Site], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(120), site() as made:
            await scenario(made)

    asyncio.run(limited())
