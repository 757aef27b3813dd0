"""Which stage of a workflow starts when, and who calls it: held against the evaluator's plain implementation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.assignment import workflow_rules
from executor.workflow import HOME, Progress, Release, Structure
from plans.service import Workflow
from tests.evaluator.naive_workflow import Instance
from tests.executor.placements import placement


def structure(*edges: Mapping[str, Any], **changed: Any) -> Structure:
    flow = Workflow.model_validate({"name": "flow", "slo": {"deadline": "1s"}, "edges": edges} | changed)
    return Structure.of(workflow_rules(flow, placement({})))


def edge(source: str, target: str, **changed: Any) -> dict[str, Any]:
    return {"from": source, "to": target} | changed


def one_row(output: str) -> int:
    return 1


@st.composite
def workflows(draw: st.DrawFn) -> Workflow:
    names = [f"s{number}" for number in range(draw(st.integers(2, 6)))]
    pairs = draw(st.lists(st.sampled_from(list(itertools.combinations(names, 2))), min_size=1, max_size=9, unique=True))
    switches = draw(st.sets(st.sampled_from(names)))
    edges = []
    for source, target in pairs:
        fanout = draw(st.sampled_from([1, 1, 1, 0.4, 1.6, 3]))
        leaving = sum(pair[0] == source for pair in pairs)
        chance = {"probability": 0.9 / leaving} if source in switches else {}
        edges.append(edge(source, target, fanout=fanout, **chance))
    joins = {target: "any" for target in {pair[1] for pair in pairs} if draw(st.booleans())}
    return Workflow.model_validate({"name": "flow", "slo": {"deadline": "1s"}, "edges": edges, "joins": joins})


@dataclass(frozen=True)
class Call:
    """What `Instance` takes for a call."""

    stage: int
    number: int


class Agents:
    """All agents that take part in one request, in one place; calls end in any order."""

    def __init__(self, flow: Workflow, position: int) -> None:
        self.structure = Structure.of(workflow_rules(flow, placement({})))
        self.instance = Instance(flow, position, 0)
        self.position = position
        self.parts = {HOME: Progress(self.structure, HOME, position)}
        self.running: list[Call] = []
        self.start(self.parts[HOME].begin(one_row), dict.fromkeys(self.instance.roots()))

    def start(self, releases: list[Release], expected: Mapping[str, Any]) -> None:
        """Start what an agent releases, which is what the plain implementation releases."""
        assert {release.stage for release in releases} == set(expected)
        for release in releases:
            number = self.instance.stages.index(release.stage)
            calls = [Call(number, call) for call in range(release.calls)]
            assert release.calls == self.instance.count[release.stage]
            self.instance.calls[release.stage] = calls  # type: ignore[assignment]
            self.instance.released.add(release.stage)
            self.running += calls

    def host_of(self, stage: str) -> str:
        return next(host for host, stages in self.structure.hosted.items() if stage in stages)

    def end(self, call: Call) -> None:
        self.running.remove(call)
        stage = self.instance.stages[call.stage]
        expected = {target for target, _ in self.instance.finish(call)}  # type: ignore[arg-type]
        if stage in self.structure.relays:
            part = self.parts[stage] = Progress(self.structure, stage, self.position)
            releases = part.begin(one_row)
        else:
            part = self.parts[self.host_of(stage)]
            releases = part.call_done(stage, call.number, one_row)
        self.start(releases, dict.fromkeys(expected))
        self.go_back(stage if stage in self.structure.relays else self.host_of(stage))

    def go_back(self, host: str) -> None:
        """Let the answer of a relay whose part is over go back to who called it."""
        while host != HOME and self.parts[host].is_over:
            caller = self.host_of(host)
            assert self.parts[caller].call_done(host, 0, one_row) == []
            host = caller

    def lose(self, call: Call) -> bool:
        """Lose a call; return whether the request fails."""
        self.running.remove(call)
        stage = self.instance.stages[call.stage]
        ends = self.instance.lose(call)  # type: ignore[arg-type]
        assert self.parts[self.host_of(stage)].call_lost(stage) == ends
        return ends


@settings(max_examples=300)
@given(flow=workflows(), position=st.integers(0, 2**30), data=st.data())
def test_law_agents_together_release_what_the_evaluator_releases_and_end_when_it_ends(
    flow: Workflow, position: int, data: st.DataObject
) -> None:
    agents = Agents(flow, position)
    while not agents.instance.complete:
        assert not agents.parts[HOME].is_over
        call = data.draw(st.sampled_from(agents.running))
        if data.draw(st.integers(0, 7)) == 0:
            if agents.lose(call):
                return
        else:
            agents.end(call)
    assert agents.parts[HOME].is_over


@given(flow=workflows())
def test_law_every_stage_is_called_by_one_agent_which_has_run_or_awaits_all_its_sources(flow: Workflow) -> None:
    found = Structure.of(workflow_rules(flow, placement({})))
    stages = list(itertools.chain.from_iterable(found.hosted.values()))
    assert sorted(stages) == sorted(found.rules.stages)
    for host, hosted in found.hosted.items():
        for stage in hosted:
            assert {edge.source for _, edge in found.into(stage)} <= {host, *hosted}
    assert set(found.hosted) - {HOME} == set(found.relays)


def test_a_chain_is_handed_on_from_agent_to_agent() -> None:
    found = structure(edge("a", "b"), edge("b", "c"))
    assert found.hosted == {HOME: ("a",), "a": ("b",), "b": ("c",)}


def test_branches_that_join_are_called_by_the_agent_before_the_fork() -> None:
    found = structure(edge("a", "b"), edge("a", "c"), edge("b", "d"), edge("c", "d"), edge("d", "e"))
    assert found.hosted == {HOME: ("a",), "a": ("b", "c", "d"), "d": ("e",)}


def test_branches_that_do_not_join_go_their_own_ways() -> None:
    found = structure(edge("a", "b"), edge("a", "c"), edge("b", "d"))
    assert found.hosted == {HOME: ("a",), "a": ("b", "c"), "b": ("d",)}


def test_what_follows_several_calls_is_called_by_the_agent_that_gathers_them() -> None:
    found = structure(edge("a", "b", fanout=1.6), edge("b", "c"))
    assert found.hosted == {HOME: ("a",), "a": ("b", "c")}


def test_several_first_stages_are_called_by_the_agent_that_got_the_request() -> None:
    found = structure(edge("a", "c"), edge("b", "c"), edge("c", "d"))
    assert found.hosted == {HOME: ("a", "b", "c"), "c": ("d",)}


def test_the_digest_names_what_is_run_and_not_how_long_it_takes() -> None:
    slow = placement({"a/0": {"b": "m"}})
    flow = Workflow.model_validate({"name": "flow", "slo": {"deadline": "1s"}, "edges": [edge("a", "b")]})
    other = flow.model_copy(update={"joins": {"b": "any"}})
    digests = [Structure.of(workflow_rules(one, slow)).digest for one in (flow, other)]
    assert digests[0] == structure(edge("a", "b")).digest != digests[1]


def test_scattered_calls_are_as_many_as_the_rows_of_what_is_handed_over() -> None:
    found = structure(edge("a", "b", inputs={"x": "boxes"}, scatter=True), edge("b", "c", fanout=2))
    progress = Progress(found, "a", 0)
    rows = {"boxes": 3}
    assert progress.begin(rows.__getitem__) == [Release(stage="b", calls=3, edges=(0,))]
    assert progress.call_done("b", 2, one_row) == progress.call_done("b", 0, one_row) == []
    assert progress.call_done("b", 1, one_row) == [Release(stage="c", calls=6, edges=(1,))]
    assert not progress.is_over


def test_a_join_any_takes_the_call_that_was_first_though_it_came_before_it_was_known_how_often_it_is_called() -> None:
    found = structure(
        edge("a", "b"),
        edge("a", "c"),
        edge("b", "d"),
        edge("c", "d", inputs={"x": "y"}, scatter=True),
        joins={"d": "any"},
    )
    progress = Progress(found, "a", 0)
    assert [release.stage for release in progress.begin(one_row)] == ["b", "c"]
    assert progress.call_done("b", 0, one_row) == []
    assert progress.call_done("c", 0, lambda _: 2) == [Release(stage="d", calls=2, edges=(2,), first_call=0)]


def test_what_ends_a_workflow_may_be_a_stage_behind_which_nothing_was_drawn() -> None:
    found = structure(edge("a", "b", fanout=0.3), edge("a", "c", fanout=1))
    assert [found.may_end(stage) for stage in "abc"] == [False, True, True]
    rare = structure(edge("a", "b", fanout=0.3))
    ended = [progress for position in range(40) if not (progress := Progress(rare, "a", position)).begin(one_row)]
    assert 20 < len(ended) < 36
    assert all(progress.is_over and progress.ends_with_host for progress in ended)


@pytest.mark.parametrize("fanout", [1.6, 0.25])
def test_calls_are_the_fan_out_in_the_mean(fanout: float) -> None:
    found = structure(edge("a", "b", fanout=fanout))
    released = [Progress(found, "a", position).begin(one_row) for position in range(2000)]
    mean = sum(release.calls for releases in released for release in releases) / 2000
    assert mean == pytest.approx(fanout, abs=0.05)
