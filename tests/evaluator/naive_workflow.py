"""Section 11: what one instance of a workflow has drawn, and what of it has happened."""

from __future__ import annotations

import math
from collections.abc import Mapping

from plans import Plan
from plans.service import Edge, Workflow
from tests.evaluator.naive_parts import Request, uniform


def stages_of(workflow: Workflow) -> list[str]:
    """Return the services in topological order; of several that could come next, the one mentioned first."""
    left = list(dict.fromkeys(name for edge in workflow.edges for name in (edge.source, edge.target)))
    order: list[str] = []
    while left:
        following = next(s for s in left if all(e.source in order for e in workflow.edges if e.target == s))
        order.append(following)
        left.remove(following)
    return order


def tails_of(workflow: Workflow, plan: Plan) -> Mapping[str, float]:
    """Return for each stage the longest path behind it, of the shortest time of a batch of one."""
    alone: dict[str, float] = {}
    for group in plan.groups:
        for entry in group.loadout:
            took_s = entry.batch_latency_s(1)
            alone[entry.service] = min(took_s, alone.get(entry.service, took_s))
    tails: dict[str, float] = {}
    for stage in reversed(stages_of(workflow)):
        behind = [alone.get(e.target, 0.0) + tails[e.target] for e in workflow.edges if e.source == stage]
        tails[stage] = max(behind, default=0.0)
    return tails


class Instance:
    """One row that names a workflow."""

    def __init__(self, workflow: Workflow, position: int, seed: int) -> None:
        self.workflow = workflow
        self.position = position
        self.stages = stages_of(workflow)
        self.ended = False
        self.released: set[str] = set()
        self.next_call = 0
        self.calls: dict[str, list[Request]] = {stage: [] for stage in self.stages}
        self.finished: set[Request] = set()
        self.lost: set[Request] = set()
        self.count: dict[str, int] = {}
        self.taken: list[Edge] = []
        self.draw(seed)

    def draw(self, seed: int) -> None:
        calls_of_edge: dict[int, int] = {}
        edges = list(enumerate(self.workflow.edges))
        for number, stage in enumerate(self.stages):
            incoming = [i for i, edge in edges if edge.target == stage]
            taken = [i for i in incoming if calls_of_edge.get(i, 0) > 0]
            self.taken += [self.workflow.edges[i] for i in taken]
            self.count[stage] = max((calls_of_edge[i] for i in taken), default=0) if incoming else 1
            leaving = [i for i, edge in edges if edge.source == stage]
            if self.count[stage] == 0:
                continue
            if any(self.workflow.edges[i].probability is not None for i in leaving):
                leaving = self.switch(leaving, uniform(seed, 2, self.position * 256 + number))
            for i in leaving:
                u = uniform(seed, 3, self.position * 256 + i)
                calls_of_edge[i] = math.floor(self.workflow.edges[i].fanout * self.count[stage] + u + 1e-9)

    def switch(self, leaving: list[int], u: float) -> list[int]:
        cumulated = 0.0
        for i in leaving:
            cumulated += self.workflow.edges[i].probability or 0.0
            if cumulated > u:
                return [i]
        return []

    def runs(self, stage: str) -> bool:
        return self.count[stage] > 0

    def roots(self) -> list[str]:
        return [s for s in self.stages if not any(edge.target == s for edge in self.workflow.edges)]

    def into(self, stage: str) -> list[Edge]:
        return [edge for edge in self.taken if edge.target == stage]

    def out_of(self, stage: str) -> list[Edge]:
        return [edge for edge in self.taken if edge.source == stage]

    def joins_any(self, stage: str) -> bool:
        return self.workflow.joins.get(stage, "all") == "any"

    def all_in(self, stage: str, where: set[Request]) -> bool:
        """Say whether every call of the stage is there; a stage that is not released has none."""
        return stage in self.released and all(call in where for call in self.calls[stage])

    def finish(self, call: Request) -> list[tuple[str, list[tuple[Request, int]]]]:
        """Take in that a call has finished; return the stages that it releases, each with (input, bytes)."""
        self.finished.add(call)
        stage = self.stages[call.stage]
        releases = []
        for target in self.stages:
            edges = self.into(target)
            if target in self.released or not any(edge.source == stage for edge in edges):
                continue
            if self.joins_any(target):
                releases.append((target, [(call, e.payload_bytes) for e in edges if e.source == stage]))
            elif all(self.all_in(edge.source, self.finished) for edge in edges):
                inputs = [(done, edge.payload_bytes) for edge in edges for done in self.calls[edge.source]]
                releases.append((target, inputs))
        return releases

    @property
    def complete(self) -> bool:
        last = [stage for stage in self.stages if self.runs(stage) and not self.out_of(stage)]
        return all(self.all_in(stage, self.finished) for stage in last)

    def lose(self, call: Request) -> bool:
        """Take in that a call was dropped or failed; say whether the instance ends by that."""
        self.lost.add(call)
        behind = self.out_of(self.stages[call.stage])
        if not behind or any(not self.joins_any(edge.target) for edge in behind):
            return True
        return any(
            all(self.all_in(edge.source, self.lost) for edge in self.into(target))
            for target in {edge.target for edge in behind}
            if target not in self.released
        )
