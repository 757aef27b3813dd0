from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from grpc import StatusCode as Code
from hypothesis import given
from hypothesis import strategies as st

from executor.cluster_connection import ClusterConnection
from executor.controller import Applied, ApplyTimeouts, NoChanges, apply
from executor.errors import LeaseHeld
from executor.lease import Lease, LeaseTiming, holding, new_holder
from plans.cluster import Cluster
from plans.errors import StalePlan
from tests.executor.fake_agent import FakeAgent, FakeGateway
from tests.executor.placements import placement

FIRST = placement({"a/0": {"chat": "v1"}, "b/0": {"chat": "v1"}})
SECOND = placement({"a/1": {"chat": "v1"}}, prior=FIRST)
OTHER = placement({"b/1": {"chat": "v1"}}, prior=FIRST)


class TestLease:
    def test_it_is_one_holders_until_it_ends(self) -> None:
        lease = Lease()
        assert lease.ask("one", 10, 0)
        assert not lease.ask("two", 10, 9.9)
        assert lease.holder(9.9) == "one"
        with pytest.raises(LeaseHeld, match=r"one .*0\.1 s"):
            lease.check("two", 9.9)
        lease.check("one", 9.9)
        assert lease.ask("two", 10, 10)
        with pytest.raises(LeaseHeld, match="two"):
            lease.check("one", 11)

    def test_it_can_be_renewed_and_given_back(self) -> None:
        lease = Lease()
        assert lease.ask("one", 10, 0)
        assert lease.ask("one", 10, 5)
        assert lease.remaining_s(6) == 9
        assert lease.ask("one", 0, 6)
        assert lease.holder(6) == ""
        assert lease.ask("two", 10, 6)

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 20), st.floats(0, 5)), max_size=30))
    def test_law_nobody_gets_it_while_another_holds_it(self, asked: list[tuple[str, float, float]]) -> None:
        lease, now_s = Lease(), 0.0
        for holder, ttl_s, passed_s in asked:
            now_s += passed_s
            before = lease.holder(now_s)
            assert lease.ask(holder, ttl_s, now_s) is (before in ("", holder))
            if before not in ("", holder):
                assert lease.holder(now_s) == before


class Site:
    def __init__(self) -> None:
        self.agents = {name: FakeAgent(name) for name in "ab"}
        self.gateway = FakeGateway()

    async def start(self) -> None:
        await asyncio.gather(*(peer.start() for peer in (*self.agents.values(), self.gateway)))

    async def kill(self) -> None:
        await asyncio.gather(*(peer.kill() for peer in (*self.agents.values(), self.gateway)))

    @property
    def cluster(self) -> Cluster:
        nodes = [
            {"name": name, "address": agent.address, "gpus": {"type": "cpu", "count": 2}}
            for name, agent in self.agents.items()
        ]
        return Cluster.model_validate({"gpu_types": {"cpu": {"memory": "1GiB"}}, "nodes": nodes})

    async def apply(self, plan: Any, **options: Any) -> Any:
        limits = ApplyTimeouts(abort_s=0.5, converge_s=2.0)
        return await apply(plan, self.cluster, [self.gateway.address], timeouts=limits, **options)

    def connection(self) -> ClusterConnection:
        return ClusterConnection(self.cluster, [self.gateway.address])


def run(scenario: Callable[[Site], Coroutine[Any, Any, None]]) -> None:
    async def all_of_it() -> None:
        site = Site()
        await site.start()
        try:
            async with asyncio.timeout(120):
                await scenario(site)
        finally:
            await site.kill()

    asyncio.run(all_of_it())


class TestHolding:
    def test_of_two_plans_applied_at_once_one_wins_and_the_other_is_stale(self) -> None:
        async def scenario(site: Site) -> None:
            await site.apply(FIRST)
            outcomes = await asyncio.gather(site.apply(SECOND), site.apply(OTHER), return_exceptions=True)
            kinds = [type(outcome) for outcome in outcomes]
            assert sorted(kind.__name__ for kind in kinds) == ["Applied", "StalePlan"]
            won = (SECOND, OTHER)[kinds.index(Applied)]
            assert {agent.digest for agent in site.agents.values()} == {won.placement_digest}
            assert {agent.generation for agent in site.agents.values()} == {2}
            assert site.gateway.table is not None
            assert site.gateway.table.placement_digest == won.placement_digest

        run(scenario)

    @pytest.mark.parametrize("done", [True, False], ids=["done", "at work"])
    def test_a_controller_that_stalls_until_its_lease_has_ended_is_stale_when_it_wakes(self, done: bool) -> None:
        async def scenario(site: Site) -> None:
            await site.apply(FIRST)
            stalled = site.agents["a"]
            stalled.calls.clear()
            wakes = stalled.hold("Stage")
            losing = asyncio.create_task(site.apply(SECOND))
            while "Stage" not in stalled.calls:
                await asyncio.sleep(0)
            stalled.held.clear()
            for agent in site.agents.values():
                agent.lease = Lease()
                if not done:
                    agent.lease.ask("two", 60, time.monotonic())
                    agent.fail("Abort", Code.FAILED_PRECONDITION, times=2)
            if done:
                assert isinstance(await site.apply(OTHER), Applied)
            stalled.fail("Stage", Code.FAILED_PRECONDITION)
            wakes.set()
            with pytest.raises(StalePlan, match=r"another apply \(generation \d\) took over") as caught:
                await losing
            assert "taken back" not in str(caught.value)

        run(scenario)

    def test_of_one_plan_applied_twice_at_once_the_second_finds_it_done(self) -> None:
        async def scenario(site: Site) -> None:
            outcomes = await asyncio.gather(site.apply(FIRST), site.apply(FIRST))
            assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Applied", "NoChanges"]

        run(scenario)

    def test_a_controller_that_takes_long_is_named_to_the_one_that_waits(self) -> None:
        async def scenario(site: Site) -> None:
            let_on = site.agents["a"].hold("Stage")
            slow = asyncio.create_task(site.apply(FIRST))
            while "Stage" not in site.agents["a"].calls:
                await asyncio.sleep(0)
            with pytest.raises(StalePlan, match=r"controller .*is changing the cluster"):
                await site.apply(FIRST, lease=LeaseTiming(wait_s=0.0))
            let_on.set()
            assert isinstance(await slow, Applied)

        run(scenario)

    def test_the_lease_of_a_dead_controller_ends_and_the_next_goes_on(self) -> None:
        async def scenario(site: Site) -> None:
            async with site.connection() as dead:
                for agent in dead.agents.values():
                    assert await agent.lease("dead", 0.2, timeout_s=5) == ""
            assert isinstance(await site.apply(FIRST), Applied)

        run(scenario)

    def test_a_dry_run_takes_no_lease(self) -> None:
        async def scenario(site: Site) -> None:
            async with site.connection() as mine, holding(mine, new_holder(), LeaseTiming()):
                result = await site.apply(FIRST, dry_run=True)
                assert result.generation == 1

        run(scenario)

    def test_it_is_given_back_on_every_node_however_the_block_ends(self) -> None:
        async def scenario(site: Site) -> None:
            async with site.connection() as mine:
                with pytest.raises(KeyError):
                    async with holding(mine, "me", LeaseTiming()):
                        raise KeyError
                for agent in mine.agents.values():
                    assert await agent.lease("you", 1.0, timeout_s=5) == ""

        run(scenario)

    def test_it_is_renewed_for_as_long_as_it_is_held(self) -> None:
        async def scenario(site: Site) -> None:
            async with site.connection() as mine, holding(mine, "me", LeaseTiming(ttl_s=0.15)):
                before = site.agents["a"].calls.count("Lease")
                while site.agents["a"].calls.count("Lease") < before + 4:
                    await asyncio.sleep(0.01)
                assert await mine.agents["a"].lease("you", 1.0, timeout_s=5) == "me"

        run(scenario)

    def test_no_changes_is_what_a_plan_in_force_gives_after_the_wait(self) -> None:
        async def scenario(site: Site) -> None:
            await site.apply(FIRST)
            assert isinstance(await site.apply(FIRST), NoChanges)

        run(scenario)
