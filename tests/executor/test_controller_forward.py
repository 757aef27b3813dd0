from __future__ import annotations

import asyncio
import time

import pytest

from executor.controller import ApplyTimeouts, NoChanges, ProgressEvent
from executor.state import Phase, ReplicaKey
from plans.errors import InvalidInput, RemoteFailure
from tests.executor.fake_site import FIRST, SECOND, Code, Site, plan, run


class TestForwardOnly:
    @pytest.mark.parametrize("after_effect", [False, True])
    def test_a_gateway_that_stumbles_is_tried_again(self, after_effect: bool) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            made.gateways[0].fail("SetRoutes", Code.UNAVAILABLE, after_effect=after_effect)
            await made.apply(SECOND)
            made.assert_runs(SECOND, 2)

        run(scenario)

    def test_a_gateway_that_refuses_what_another_took_is_asked_until_it_can(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            made.gateways[1].fail("SetRoutes", Code.FAILED_PRECONDITION, times=3)
            await made.apply(SECOND, timeouts=ApplyTimeouts())
            made.assert_runs(SECOND, 2)

        run(scenario)

    def test_an_agent_that_stumbles_after_the_flip_is_tried_again(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            made.agents["b"].fail("Finish", Code.UNAVAILABLE)
            await made.apply(SECOND)
            made.assert_runs(SECOND, 2)

        run(scenario)

    def test_an_agent_that_lost_its_state_after_the_flip_is_brought_to_the_plan_anew(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            agent = made.agents["b"]

            def progress(event: ProgressEvent) -> None:
                if event.step == "route" and event.outcome == "done":
                    agent.generation, agent.digest, agent.desired, agent.before = 0, "", None, None
                    agent.phases = {}

            await made.apply(SECOND, progress=progress)
            made.assert_runs(SECOND, 2)

        run(scenario)

    def test_a_gateway_that_never_flips_keeps_the_old_replicas_and_running_again_goes_on(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            made.gateways[1].fail("SetRoutes", Code.UNAVAILABLE, times=9)
            with pytest.raises(RemoteFailure, match="again to go on from here") as caught:
                await made.apply(SECOND)
            assert caught.value.retryable
            assert made.gateways[1].address in str(caught.value)
            assert "a/0 v1" in made.running("a")  # the gateway that did not flip still sends there
            made.gateways[1].heal()
            result = await made.apply(SECOND)
            assert isinstance(result, NoChanges)
            assert any("routes generation 1" in line for line in result.converged)
            made.assert_runs(SECOND, 3)

        run(scenario)

    def test_an_agent_that_dies_after_the_flip_is_named_and_mended_by_the_next_apply(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            made.agents["b"].fail("Finish", Code.UNAVAILABLE, times=99)
            with pytest.raises(RemoteFailure, match=r"agent of b at .*again to go on"):
                await made.apply(SECOND)
            assert made.generations == {2}
            made.agents["b"].heal()
            made.agents["b"].phases.pop(ReplicaKey(group="b/1", service="chat", variant="v2"))
            result = await made.apply(SECOND)
            assert isinstance(result, NoChanges)
            made.assert_runs(SECOND, 3)

        run(scenario)

    def test_a_gateway_that_lost_its_routes_gets_them_back(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            made.gateways[0].tables.clear()
            result = await made.apply(FIRST)
            assert isinstance(result, NoChanges)
            assert len(result.converged) == 1
            made.assert_runs(FIRST, 2)

        run(scenario)

    def test_an_agent_that_moved_is_told_to_the_gateways_though_the_plan_is_the_same(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            agent = made.agents["a"]
            await agent.kill()
            before, agent.address = agent.address, ""
            await agent.start()
            assert agent.address != before
            result = await made.apply(FIRST)
            assert isinstance(result, NoChanges)
            assert all(before in line and agent.address in line for line in result.converged)
            made.assert_runs(FIRST, 2)
            for gateway in made.gateways:
                assert agent.address in {backend.address for backend in gateway.tables[-1].backends}

        run(scenario)

    def test_a_plan_that_is_live_but_does_not_serve_is_waited_for_and_then_told(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            key = ReplicaKey(group="a/0", service="chat", variant="v1")
            made.agents["a"].phases[key] = Phase.LOADING
            result = await made.apply(FIRST)
            assert isinstance(result, NoChanges)
            assert result.not_serving == ("a: chat (v1) on a/0 is loading",)
            waiting = asyncio.create_task(made.apply(FIRST, timeouts=ApplyTimeouts(), progress=told.append))
            while not told:
                await asyncio.sleep(0)
            await made.agents["b"].kill()  # not for long: that is waited for, too
            while len(told) < 2:
                await asyncio.sleep(0)
            assert not any(
                agent.lease.holder(time.monotonic()) for agent in made.agents.values()
            )  # operators may mend it meanwhile
            await made.agents["b"].start()
            made.agents["a"].phases[key] = Phase.SERVING
            result = await waiting
            assert isinstance(result, NoChanges)
            assert result.not_serving == ()
            assert made.generations == {1}

        told: list[ProgressEvent] = []
        run(scenario)

    def test_a_plan_that_would_leave_a_service_to_drained_nodes_is_refused_before_anything_changes(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            made.agents["c"].drained = True
            for dry_run in (True, False):
                with pytest.raises(InvalidInput, match="foreplan undrain c"):
                    await made.apply(plan({"c/0": "v1"}, prior=FIRST), dry_run=dry_run)
            made.assert_runs(FIRST, 1)
            await made.apply(plan({"a/0": "v1", "c/0": "v1"}, prior=FIRST))

        run(scenario)

    def test_an_apply_cut_short_between_commits_and_flip_does_not_make_other_plans_stale(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            made.agents["a"].generation, made.agents["a"].digest = 2, SECOND.placement_digest
            other = plan({"c/0": "v1"}, prior=FIRST)
            await made.apply(other)
            made.assert_runs(other, 3)

        run(scenario)
