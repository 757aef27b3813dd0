"""Controller, gateway, load client and real agents (workers of the fake runtime) together, and killed on the way."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest

from executor.controller import Applied, ApplyTimeouts, NoChanges, ProgressEvent, apply, status
from executor.load import LoadOptions, LoadProgress, LoadResult, replay
from plans.errors import ApplyRolledBack, InvalidInput, RemoteFailure
from plans.plan import Plan
from plans.service import Services
from tests.executor.peer_process import PeerProcess, cluster_of, processes
from tests.executor.placements import placement
from traces.table import RequestTrace

SERVICES = Services.model_validate(
    {"services": [{"name": "chat", "slo": {"deadline": "10s"}, "variants": [{"model": "fake-double"}]}]}
)
BOTH = placement({"a/0": {"chat": "fake-double"}, "b/0": {"chat": "fake-double"}})
TIMEOUTS = ApplyTimeouts(abort_s=0.5, converge_s=20.0)


@dataclass(frozen=True)
class Site:
    a: PeerProcess
    b: PeerProcess
    gateway: PeerProcess

    def apply(self, wanted: Plan, **options: Any) -> Any:
        cluster = cluster_of(self.a, self.b)
        return asyncio.run(apply(wanted, cluster, [self.gateway.address], timeouts=TIMEOUTS, **options))

    @property
    def generation(self) -> int:
        return self.status().live.generation

    def status(self) -> Any:
        return asyncio.run(status(cluster_of(self.a, self.b), [self.gateway.address]))

    def until_healthy(self) -> None:
        async def asking() -> None:
            async with asyncio.timeout(120):
                while True:
                    found = await status(cluster_of(self.a, self.b), [self.gateway.address])
                    routed = [replica for replica in found.replicas if replica.routed_by]
                    if found.healthy and len(routed) == len(found.replicas):
                        return
                    await asyncio.sleep(0.02)

        asyncio.run(asking())

    def load(self, count: int, rate_rps: float, at: dict[int, Callable[[], Any]] | None = None) -> LoadResult:
        """Replay ``count`` requests; ``at`` gives what to do as soon as so many have ended."""
        todo = dict(at or {})

        def progress(one: LoadProgress) -> None:
            for due in [due for due in todo if due <= one.done]:
                todo.pop(due)()

        arrivals = pd.DataFrame({"arrival_s": np.arange(count) / rate_rps, "service": "chat"})
        return asyncio.run(
            replay(RequestTrace(arrivals), self.gateway.address, SERVICES, LoadOptions(on_progress=progress))
        )

    def load_while(self, count: int, rate_rps: float, wanted: Plan, **options: Any) -> LoadResult:
        """Replay ``count`` requests, and bring the site to ``wanted`` once some of them have ended."""

        async def both() -> LoadResult:
            begun = asyncio.Event()

            def progress(one: LoadProgress) -> None:
                if one.done >= 20:
                    begun.set()

            arrivals = RequestTrace(pd.DataFrame({"arrival_s": np.arange(count) / rate_rps, "service": "chat"}))
            load = asyncio.create_task(
                replay(arrivals, self.gateway.address, SERVICES, LoadOptions(on_progress=progress))
            )
            await begun.wait()
            await apply(wanted, cluster_of(self.a, self.b), [self.gateway.address], timeouts=TIMEOUTS, **options)
            return await load

        return asyncio.run(both())


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    made = Site(
        a=PeerProcess("agent", folder / "a", node="a"),
        b=PeerProcess("agent", folder / "b", node="b"),
        gateway=PeerProcess("gateway", folder / "gateway"),
    )
    with processes(made.a, made.b, made.gateway):
        yield made


@pytest.fixture
def site(peers: Site) -> Site:
    """Two agents and a gateway that run `BOTH`, whatever the test before left."""
    for peer in (peers.a, peers.b, peers.gateway):
        if not peer.alive:
            peer.start()
    peers.apply(BOTH, prior=peers.status().live)
    peers.until_healthy()
    return peers


def kill(process: Any) -> Callable[[], None]:
    return lambda: process.send_signal(signal.SIGKILL)


def test_a_plan_is_served_replaced_and_emptied(site: Site) -> None:
    generation = site.generation
    result = site.load(60, 200.0)
    assert set(result.requests["outcome"]) == {"good"}
    shares = result.requests["group"].value_counts()
    assert set(shares.index) == {"a/0", "b/0"}
    assert shares.min() >= 20  # equal weights, less what each has waiting
    assert set(result.requests["variant"]) == {"fake-double"}
    assert (result.requests["batch_size"] >= 1).all()
    assert site.apply(BOTH) == NoChanges(generation=generation, placement_digest=BOTH.placement_digest)

    moved = placement({"a/1": {"chat": "fake-double"}}, prior=BOTH)
    assert site.apply(moved).generation == generation + 1
    assert set(site.load(10, 200.0).requests["group"]) == {"a/1"}
    assert {replica.group for replica in site.status().replicas} == {"a/1"}

    site.apply(placement({}, prior=moved))
    assert site.status().replicas == ()
    assert set(site.load(3, 200.0).requests["status"]) == {"NOT_FOUND"}
    assert site.a.children() == [] == site.b.children()
    assert [peer.stop() for peer in (site.gateway, site.a, site.b)] == [0, 0, 0]


def test_what_does_not_fit_beside_the_old_is_loaded_after_it(site: Site) -> None:
    big = 700 * 2**20
    before = placement({"a/1": {"chat": "fake-double"}}, prior=BOTH, memory_bytes=big)
    after = placement({"a/1": {"chat": "fake-slow-20"}}, prior=before, memory_bytes=big)
    site.apply(before)
    result = site.apply(after)
    assert [str(key) for key in result.deferred] == ["chat (fake-slow-20) on a/1"]
    assert set(site.load(4, 50.0).requests["variant"]) == {"fake-slow-20"}


def test_replicas_that_have_no_room_beside_the_old_are_replaced_in_turn_and_no_request_is_lost(site: Site) -> None:
    """Each node's device is full. In one go no replica would serve meanwhile; in waves one always does."""
    big = 700 * 2**20
    before, after = (
        placement({"a/0": {"chat": variant}, "b/0": {"chat": variant}}, memory_bytes=big)
        for variant in ("fake-slow-20", "fake-double")
    )
    site.apply(before, prior=site.status().live)
    generation = site.generation
    seen: list[str] = []
    result = site.load_while(
        300,
        100.0,
        after,
        prior=site.status().live,
        progress=lambda event: seen.append(event.step) if event.outcome == "begun" else None,
    )
    assert set(result.requests["outcome"]) == {"good"}
    assert set(result.requests["variant"]) == {"fake-slow-20", "fake-double"}
    assert site.generation == generation + 2  # two waves
    assert seen.count("finish") == 4
    assert site.apply(after) == NoChanges(generation=generation + 2, placement_digest=after.placement_digest)
    assert set(site.load(4, 50.0).requests["variant"]) == {"fake-double"}


def test_an_agent_that_dies_between_two_waves_is_brought_to_the_plan_when_it_is_back(site: Site) -> None:
    big = 700 * 2**20
    before, after = (
        placement({"a/0": {"chat": variant}, "b/0": {"chat": variant}}, memory_bytes=big)
        for variant in ("fake-slow-20", "fake-double")
    )
    site.apply(before, prior=site.status().live)
    steps: list[str] = []

    def progress(event: ProgressEvent) -> None:
        if (event.peer, event.step) == ("b", "stage"):
            steps.append(event.outcome)
            if steps == ["begun", "done", "begun"]:
                site.b.process.kill()
                site.b.process.wait()
            elif event.outcome == "failed" and site.b.process.poll() is not None:
                site.b.start()

    applied = site.apply(after, prior=site.status().live, progress=progress)
    assert isinstance(applied, Applied)
    assert "failed" in steps
    site.until_healthy()
    assert set(site.load(20, 50.0).requests["group"]) == {"a/0", "b/0"}


def test_a_service_goes_from_one_device_to_two_sharded_and_back_and_no_request_is_lost(site: Site) -> None:
    one = placement({"a/0": {"chat": "fake-double"}}, prior=BOTH)
    two = placement({"a/0-1": {"chat": "fake-double"}}, prior=one)
    site.apply(one)
    for after, before_group, after_group in ((two, "a/0", "a/0-1"), (one, "a/0-1", "a/0")):
        result = site.load_while(200, 100.0, after, prior=site.status().live)
        assert set(result.requests["outcome"]) == {"good"}
        assert set(result.requests["group"].head(20)) == {before_group}
        assert set(site.load(4, 100.0).requests["group"]) == {after_group}


def test_what_a_node_cannot_run_is_refused_and_what_runs_goes_on(site: Site) -> None:
    generation = site.generation
    wrong = placement({"a/0": {"chat": "no-such-model"}, "b/1": {"chat": "nor-this"}}, prior=BOTH)
    with pytest.raises(InvalidInput) as caught:
        site.apply(wrong)
    assert {fault.found for fault in caught.value.faults} == {"'no-such-model'", "'nor-this'"}
    with pytest.raises(InvalidInput, match="memory"):
        site.apply(placement({"a/0": {"chat": "fake-double"}}, prior=BOTH, memory_bytes=2 * 2**30))
    assert site.generation == generation
    assert set(site.load(4, 100.0).requests["outcome"]) == {"good"}


def test_requests_of_a_killed_agent_are_answered_by_the_other(site: Site) -> None:
    result = site.load(120, 100.0, {20: kill(site.a.process)})
    assert set(result.requests["outcome"]) == {"good"}
    late = result.requests.tail(20)
    assert set(late["group"]) == {"b/0"}
    problem = site.status().agents[0].problem
    assert problem.startswith("tells no state")


def test_requests_of_a_killed_worker_are_answered_by_the_other_and_it_comes_back(site: Site) -> None:
    (worker,) = site.a.children()
    result = site.load(120, 100.0, {20: kill(worker)})
    assert set(result.requests["outcome"]) == {"good"}
    site.until_healthy()
    assert set(site.load(4, 100.0).requests["group"]) == {"a/0", "b/0"}


def test_requests_of_an_agent_that_hangs_are_answered_by_the_other_and_it_comes_back(site: Site) -> None:
    try:
        result = site.load(120, 100.0, {20: lambda: site.a.process.send_signal(signal.SIGSTOP)})
    finally:
        site.a.process.send_signal(signal.SIGCONT)
    assert set(result.requests["outcome"]) == {"good"}
    assert set(result.requests.tail(20)["group"]) == {"b/0"}
    site.until_healthy()
    assert set(site.load(4, 100.0).requests["group"]) == {"a/0", "b/0"}


def test_a_killed_gateway_fails_requests_and_goes_on_with_its_routes_after_a_restart(site: Site) -> None:
    result = site.load(120, 100.0, {20: kill(site.gateway.process)})
    counts = result.requests["outcome"].value_counts()
    assert counts["good"] >= 20
    assert counts["failed"] >= 1
    assert counts.sum() == 120
    with pytest.raises(RemoteFailure, match="foreplan gateway"):
        site.load(1, 1.0)
    site.gateway.start()
    site.until_healthy()
    assert set(site.load(4, 100.0).requests["outcome"]) == {"good"}
    assert isinstance(site.apply(BOTH), NoChanges)


def test_killed_agents_take_up_their_plan_after_a_restart(site: Site) -> None:
    generation = site.generation
    site.a.kill()
    site.b.kill()
    with pytest.raises(RemoteFailure, match="nothing was changed"):
        site.apply(BOTH)
    site.a.start()
    site.b.start()
    site.until_healthy()
    assert set(site.load(4, 100.0).requests["outcome"]) == {"good"}
    assert site.apply(BOTH) == NoChanges(generation=generation, placement_digest=BOTH.placement_digest)


@pytest.mark.parametrize("step", ["stage", "commit"])
def test_an_agent_that_dies_before_the_flip_rolls_the_apply_back(site: Site, step: str) -> None:
    generation = site.generation
    after = placement({"a/1": {"chat": "fake-double"}, "b/1": {"chat": "fake-double"}}, prior=BOTH)

    def progress(event: ProgressEvent) -> None:
        if (event.step, event.peer, event.outcome) == (step, "b", "begun") and site.b.process.poll() is None:
            site.b.process.kill()
            site.b.process.wait()

    with pytest.raises(ApplyRolledBack, match="agent of b"):
        site.apply(after, progress=progress)
    found = site.status()
    assert found.agents[0].generation == generation
    assert {replica.group for replica in found.replicas if replica.node == "a"} == {"a/0"}
    assert set(site.load(4, 100.0).requests["group"]) == {"a/0"}
    site.b.start()
    assert site.apply(after).generation > generation
    assert set(site.load(4, 100.0).requests["group"]) == {"a/1", "b/1"}


def test_an_agent_that_dies_after_the_flip_is_brought_to_the_plan_when_it_is_back(site: Site) -> None:
    after = placement({"a/1": {"chat": "fake-double"}, "b/1": {"chat": "fake-double"}}, prior=BOTH)

    pid = site.b.process.pid

    def progress(event: ProgressEvent) -> None:
        if (event.step, event.peer) == ("finish", "b") and site.b.process.pid == pid:
            if event.outcome == "begun":
                site.b.process.kill()
                site.b.process.wait()
            elif event.outcome == "failed":
                site.b.start()

    assert isinstance(site.apply(after, progress=progress), Applied)
    site.until_healthy()
    assert {replica.group for replica in site.status().replicas} == {"a/1", "b/1"}
