from __future__ import annotations

import asyncio

import pytest

from executor.controller import Applied, ApplyTimeouts, NoChanges, ProgressEvent, WouldApply, apply
from executor.state import DesiredState, ReplicaKey
from plans.errors import ApplyRolledBack, Fault, InvalidInput, RemoteFailure, StalePlan
from plans.plan import Prior
from tests.executor.fake_site import FIRST, NODES, SECOND, Code, Site, plan, run


class TestApply:
    def test_a_first_plan_reaches_every_node_and_gateway(self) -> None:
        async def scenario(made: Site) -> None:
            result = await made.apply(FIRST)
            assert isinstance(result, Applied)
            assert (result.generation, result.placement_digest, result.deferred) == (1, FIRST.placement_digest, ())
            made.assert_runs(FIRST, 1)
            assert made.agents["c"].generation == 1  # a node without work takes part in the generation

        run(scenario)

    def test_the_next_plan_loads_beside_flips_and_unloads(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            result = await made.apply(SECOND)
            assert isinstance(result, Applied)
            made.assert_runs(SECOND, 2)
            assert {(str(change.key), change.action) for change in result.changes} == {
                ("chat (v1) on a/0", "unload"),
                ("chat (v2) on a/0", "load"),
                ("chat (v1) on b/0", "keep"),
                ("chat (v2) on b/1", "load"),
            }
            assert made.agents["a"].calls.index("Commit") < made.agents["a"].calls.index("Finish")

        run(scenario)

    def test_applying_what_is_live_changes_nothing(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            for agent in made.agents.values():
                agent.calls.clear()
            result = await made.apply(FIRST)
            assert result == NoChanges(generation=1, placement_digest=FIRST.placement_digest)
            for agent in made.agents.values():
                assert [call for call in agent.calls if call != "Lease"] == ["GetState"]

        run(scenario)

    def test_an_empty_plan_empties_the_cluster(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            nothing = plan({}, prior=FIRST)
            await made.apply(nothing)
            assert made.generations == {2}
            assert [made.running(node) for node in NODES] == [{}, {}, {}]
            assert made.gateways[0].table is not None
            assert made.gateways[0].table.services == ()

        run(scenario)

    def test_what_must_wait_for_memory_is_routed_to_only_after_it_is_loaded(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            waiting = ReplicaKey(group="a/0", service="chat", variant="v2")
            made.agents["a"].no_room_for = {waiting}
            result = await made.apply(SECOND)
            assert result.deferred == (waiting,)
            made.assert_runs(SECOND, 2)
            flip, final = made.gateways[0].tables[1:]
            assert [{target.group for target in table.services[0].targets} for table in (flip, final)] == [
                {"b/0", "b/1"},
                {"a/0", "b/0", "b/1"},
            ]

        run(scenario)

    def test_a_dry_run_tells_the_changes_and_makes_none(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            result = await made.apply(SECOND, dry_run=True)
            assert isinstance(result, WouldApply)
            assert result.generation == 2
            assert {change.action for change in result.changes} == {"load", "keep", "unload"}
            made.assert_runs(FIRST, 1)

        run(scenario)

    def test_progress_names_every_step_on_every_peer_in_order(self) -> None:
        async def scenario(made: Site) -> None:
            events: list[ProgressEvent] = []
            await made.apply(FIRST, progress=events.append)
            steps = list(dict.fromkeys(event.step for event in events))
            assert steps == ["validate", "stage", "commit", "route", "finish"]
            done = [(event.step, event.peer) for event in events if event.outcome == "done"]
            assert len(done) == 4 * len(NODES) + 2

        run(scenario)

    def test_a_stored_plan_is_applied_anew_on_what_is_live(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            await made.apply(SECOND)
            with pytest.raises(StalePlan):
                await made.apply(FIRST)
            await made.apply(FIRST, prior=Prior(generation=2, digest=SECOND.placement_digest))
            made.assert_runs(FIRST, 3)

        run(scenario)


class TestRefused:
    def test_a_plan_made_against_something_else_than_what_is_live_is_stale(self) -> None:
        async def scenario(made: Site) -> None:
            with pytest.raises(StalePlan, match="nothing is live"):
                await made.apply(SECOND)
            await made.apply(FIRST)
            with pytest.raises(StalePlan, match=r"an empty cluster.*generation 1.*--current"):
                await made.apply(plan({"c/0": "v1"}))
            made.assert_runs(FIRST, 1)

        run(scenario)

    def test_a_plan_for_another_cluster_is_refused_with_every_fault_before_any_call(self) -> None:
        async def scenario(made: Site) -> None:
            with pytest.raises(InvalidInput) as caught:
                await made.apply(plan({"a/7": "v1", "elsewhere/0": "v1"}))
            assert [fault.field for fault in caught.value.faults] == ["groups[0].gpus", "groups[1].node"]
            assert all("another cluster" in fault.remedy for fault in caught.value.faults)
            assert not made.agents["a"].calls

        run(scenario)

    def test_what_nodes_object_to_is_told_all_at_once_and_nothing_is_staged(self) -> None:
        async def scenario(made: Site) -> None:
            for node in ("a", "b"):
                made.agents[node].faults = [Fault(field="groups[0]", found="9 GiB", expected="at most 1 GiB")]
            with pytest.raises(InvalidInput) as caught:
                await made.apply(FIRST)
            assert [fault.where.split(" at ")[0] for fault in caught.value.faults] == ["agent of a", "agent of b"]
            assert made.generations == {0}
            assert not any("Stage" in agent.calls for agent in made.agents.values())

        run(scenario)

    def test_dead_peers_are_all_named_with_what_to_do(self) -> None:
        async def scenario(made: Site) -> None:
            await made.agents["b"].kill()
            await made.gateways[1].kill()
            with pytest.raises(RemoteFailure) as caught:
                await made.apply(FIRST)
            text = str(caught.value)
            assert made.agents["b"].address in text
            assert made.gateways[1].address in text
            assert "foreplan agent" in text
            assert made.agents["a"].generation == 0

        run(scenario)

    def test_an_agent_that_is_another_node_is_not_given_work(self) -> None:
        async def scenario(made: Site) -> None:
            made.agents["b"].node = "elsewhere"
            with pytest.raises(RemoteFailure, match="that of node 'elsewhere'"):
                await made.apply(FIRST)

        run(scenario)

    @pytest.mark.parametrize("gateways", [[], ["nowhere"], [":80"], ["127.0.0.1:0"], ["127.0.0.1:73537"], ["h:²"]])
    def test_gateways_must_be_named_by_address(self, gateways: list[str]) -> None:
        async def scenario(made: Site) -> None:
            with pytest.raises(InvalidInput, match="--gateway"):
                await apply(FIRST, made.cluster, gateways)

        run(scenario)


class TestRollBack:
    @pytest.mark.parametrize("after_effect", [False, True], ids=["before its effect", "after its effect"])
    @pytest.mark.parametrize("method", ["Validate", "Stage", "Commit"])
    @pytest.mark.parametrize("status", [Code.INTERNAL, Code.UNAVAILABLE])
    def test_a_failure_before_the_flip_leaves_everything_as_it_was(
        self, method: str, status: Code, after_effect: bool
    ) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            made.agents["b"].fail(method, status, after_effect=after_effect)
            with pytest.raises(ApplyRolledBack, match=f"agent of b at .*{status.name}.*back where it was") as caught:
                await made.apply(SECOND)
            assert isinstance(caught.value.__cause__, RemoteFailure)
            made.assert_runs(FIRST, 1)
            await made.apply(SECOND)
            made.assert_runs(SECOND, 2)

        run(scenario)

    def test_every_node_that_took_too_long_is_named_with_the_option_that_gives_it_longer(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            held = [agent.hold("Stage") for agent in made.agents.values()]
            with pytest.raises(ApplyRolledBack) as caught:
                await made.apply(SECOND, timeouts=ApplyTimeouts(stage_s=0.05, abort_s=1.0))
            for event in held:
                event.set()
            text = str(caught.value)
            assert text.count("not done within 0.05 s; give it longer with --timeout stage=SECONDS") == len(NODES)
            assert all(f"agent of {node} at" in text for node in NODES)
            made.assert_runs(FIRST, 1)

        run(scenario)

    def test_routes_that_every_gateway_refuses_are_taken_back(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            for gateway in made.gateways:
                gateway.fail("SetRoutes", Code.INVALID_ARGUMENT, times=2)
            with pytest.raises(ApplyRolledBack, match="INVALID_ARGUMENT"):
                await made.apply(SECOND)
            made.assert_runs(FIRST, 1)

        run(scenario)

    def test_a_node_that_cannot_be_taken_back_is_named_and_the_next_apply_mends_it(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            made.agents["b"].fail("Commit", Code.INTERNAL)
            made.agents["a"].fail("Abort", Code.INTERNAL, times=9)
            with pytest.raises(ApplyRolledBack, match="taken back, except: agent of a at"):
                await made.apply(SECOND)
            assert made.agents["a"].generation == 2
            await made.apply(SECOND)
            made.assert_runs(SECOND, 3)

        run(scenario)

    def test_an_apply_that_is_cancelled_takes_everything_back(self, caplog: pytest.LogCaptureFixture) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            committed = asyncio.Event()

            def progress(event: ProgressEvent) -> None:
                if (event.step, event.peer, event.outcome) == ("commit", "a", "done"):
                    committed.set()

            go_on = made.agents["b"].hold("Commit")
            task = asyncio.create_task(made.apply(SECOND, progress=progress))
            await committed.wait()
            task.cancel()
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            made.assert_runs(FIRST, 1)

        run(scenario)
        assert "everything was taken back" in caplog.text

    def test_the_loser_of_two_applies_is_told_who_won(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            agent = made.agents["a"]
            agent.calls.clear()
            held = agent.hold("Stage")
            losing = asyncio.create_task(made.apply(SECOND))
            while "Stage" not in agent.calls:
                await asyncio.sleep(0)
            winner = DesiredState(generation=5, placement_digest="sha256:other", node="a")
            agent._failures["Stage"].append((Code.FAILED_PRECONDITION, False))
            agent.staged = winner
            held.set()
            with pytest.raises(StalePlan, match=r"another apply \(generation 5\) took over") as caught:
                await losing
            assert "still holds" not in str(caught.value)
            assert "back where it was" not in str(caught.value)
            assert agent.staged == winner
            assert made.agents["b"].generation == 1

        run(scenario)

    def test_one_that_lost_its_number_to_another_plan_leaves_that_alone(self) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            agent = made.agents["a"]
            agent.fail("Commit", Code.FAILED_PRECONDITION)
            other = (2, "sha256:other")

            def progress(event: ProgressEvent) -> None:
                if (event.step, event.peer, event.outcome) == ("commit", "a", "failed"):
                    agent.generation, agent.digest = other

            with pytest.raises(StalePlan, match=r"another apply \(generation 2\) took over"):
                await made.apply(SECOND, progress=progress)
            assert (agent.generation, agent.digest) == other

        run(scenario)

    @pytest.mark.parametrize("method", ["SetRoutes", "Finish"])
    def test_one_that_is_cancelled_after_the_commit_says_that_it_is_not_everywhere(
        self, method: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scenario(made: Site) -> None:
            await made.apply(FIRST)
            peer = made.gateways[0] if method == "SetRoutes" else made.agents["a"]
            peer.calls.clear()
            peer.hold(method)
            task = asyncio.create_task(made.apply(SECOND))
            while method not in peer.calls:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            peer.held.clear()
            assert made.agents["b"].generation == 2

        run(scenario)
        assert "generation 2 is not everywhere yet; run `foreplan apply` again" in caplog.text
