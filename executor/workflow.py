"""How a workflow is run, as far as that needs no input or output: who calls which stage, and when (docs/executor.md).

A stage that surely has one call at most, and behind which nothing joins with what does not come from it, is a *relay*:
its agent goes on with what follows. Every other stage is called by the agent of the relay before it, which gathers what
fans out and what joins. So nothing ever waits at an agent for somebody else's request, and the answer goes back the way
that the calls came.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from executor.state import WorkflowEdge, WorkflowRules
from plans.workflows import DRAW_EDGES, DRAW_SWITCHES, drawn_calls, drawn_share

__all__ = [
    "DIGEST_PARAMETER",
    "HOME",
    "POSITION_PARAMETER",
    "STAGE_PARAMETER",
    "Progress",
    "Release",
    "Structure",
]

STAGE_PARAMETER, DIGEST_PARAMETER, POSITION_PARAMETER = "workflow_stage", "workflow_digest", "workflow_position"
"""Parameters of a request: with which stage to begin, which definition is meant, and the number by which to draw."""

HOME = ""
"""In place of a stage: the agent to which a gateway sent the request; it calls the stages that no edge leads to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """A workflow, and what follows from its edges.

    Attributes:
        rules: The workflow.
        digest: Names its stages, edges and joins.
        behind: The stages that can be reached from each.
        hosted: Stages that the agent of a relay (or of `HOME`) calls, by relay, in topological order.
        relays: Stages whose agents call others, in topological order.
    """

    rules: WorkflowRules
    digest: str
    behind: Mapping[str, frozenset[str]]
    hosted: Mapping[str, tuple[str, ...]]
    relays: tuple[str, ...]

    @classmethod
    def of(cls, rules: WorkflowRules) -> Structure:
        """Return the structure of ``rules``."""
        behind = {stage: _behind(rules.edges, stage) for stage in rules.stages}
        single = _single(rules)
        relays = tuple(
            stage
            for stage in rules.stages
            if behind[stage]
            and stage in single
            and all(
                edge.source == stage or edge.source in behind[stage]
                for edge in rules.edges
                if edge.target in behind[stage]
            )
        )
        hosts = {stage: next((r for r in reversed(relays) if stage in behind[r]), HOME) for stage in rules.stages}
        return cls(
            rules=rules,
            digest=_digest(rules),
            behind=behind,
            hosted={
                host: tuple(stage for stage in rules.stages if hosts[stage] == host)
                for host in dict.fromkeys((HOME, *hosts.values()))
            },
            relays=relays,
        )

    def into(self, stage: str) -> list[tuple[int, WorkflowEdge]]:
        """Return the numbered edges that lead to ``stage``."""
        return [(number, edge) for number, edge in enumerate(self.rules.edges) if edge.target == stage]

    def out_of(self, stage: str) -> list[tuple[int, WorkflowEdge]]:
        """Return the numbered edges that leave ``stage``."""
        return [(number, edge) for number, edge in enumerate(self.rules.edges) if edge.source == stage]

    def tail_s(self, stage: str) -> float:
        """Return the least seconds that the stages behind ``stage`` take."""
        return self.rules.tails_s[self.rules.stages.index(stage)]

    def may_end(self, stage: str) -> bool:
        """Say whether the workflow may end with ``stage``, so that its outputs are part of the answer."""
        return not any(
            edge.probability is None and edge.fanout >= 1 and not edge.scatter for _, edge in self.out_of(stage)
        )


def _behind(edges: Iterable[WorkflowEdge], stage: str) -> frozenset[str]:
    found = {stage}
    grown = True
    while grown:
        more = {edge.target for edge in edges if edge.source in found} - found
        found |= more
        grown = bool(more)
    return frozenset(found - {stage})


def _single(rules: WorkflowRules) -> set[str]:
    """Return the stages that have one call at most."""
    single: set[str] = set()
    for stage in rules.stages:
        edges = [edge for edge in rules.edges if edge.target == stage]
        if all(edge.fanout == 1 and not edge.scatter and edge.source in single for edge in edges):
            single.add(stage)
    return single


def _digest(rules: WorkflowRules) -> str:
    content = repr((rules.name, rules.edges, rules.stages, sorted(rules.any_joins)))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A stage that starts now.

    Attributes:
        stage: The stage.
        calls: How many calls it has, at least 1.
        edges: Numbers of the edges that hand something over: those taken, or of a join ``any`` the one that was first.
        first_call: Of a join ``any``: which call of that edge's source; None otherwise.
    """

    stage: str
    calls: int
    edges: tuple[int, ...] = ()
    first_call: int | None = None


class Progress:
    """How far the stages are that one agent calls (docs/evaluator.md, section 11, and `Structure`).

    Args:
        structure: The workflow.
        host: The relay whose agent this is, or `HOME`.
        position: Numbers the request, for draws.
        seed: Of the draws.
    """

    def __init__(self, structure: Structure, host: str, position: int, seed: int = 0) -> None:
        self._structure = structure
        self._host = host
        self._stages = structure.hosted.get(host, ())
        self._relays = frozenset(structure.relays)
        self._position = position
        self._seed = seed
        self._calls: dict[str, int] = {}  # of stages that are determined; 0: skipped
        self._unfinished: dict[str, int] = {}
        self._lost: dict[str, int] = {}
        self._edge_calls: dict[int, int] = {}  # of edges that are determined; 0: not taken
        self._released: set[str] = set()
        self._first_calls: dict[str, int] = {}  # of each stage the call that finished first, in the order of their ends

    def begin(self, rows: Callable[[str], int]) -> list[Release]:
        """Return the stages that start at once; ``rows`` tells the rows of each output of the host's own call."""
        if self._host != HOME:
            self._calls[self._host], self._unfinished[self._host] = 1, 0
            self._first_calls[self._host] = 0
            self._note_edges(self._host, rows)
        return self._advance()

    def call_done(self, stage: str, call: int, rows: Callable[[str], int]) -> list[Release]:
        """Return the stages that start now that a call has finished.

        Args:
            stage: Of which stage.
            call: Which call of it.
            rows: Tells the rows of an output of all calls of the stage; asked when this was the last.
        """
        self._unfinished[stage] -= 1
        if not self._unfinished[stage] and stage not in self._relays:
            self._note_edges(stage, rows)
        self._first_calls.setdefault(stage, call)
        return self._advance()

    def call_lost(self, stage: str) -> bool:
        """Note that a call was dropped or failed; return whether the request fails with it."""
        self._lost[stage] = self._lost.get(stage, 0) + 1
        taken = (
            [] if stage in self._relays else [e for n, e in self._structure.out_of(stage) if self._edge_calls.get(n)]
        )
        if not taken or any(edge.target not in self._structure.rules.any_joins for edge in taken):
            return True
        return any(
            edge.target not in self._released
            and all(
                self._lost.get(other.source, 0) >= self._calls.get(other.source, 1)
                for number, other in self._structure.into(edge.target)
                if self._edge_calls.get(number, 1)
            )
            for edge in taken
        )

    @property
    def is_over(self) -> bool:
        """Whether every stage that ends the workflow here, or goes on with it elsewhere, has finished."""
        return all(
            stage in self._calls and (not self._ends(stage) or not self._unfinished[stage]) for stage in self._stages
        )

    @property
    def ends(self) -> tuple[str, ...]:
        """The stages that ran and whose outputs are the answer, or whose agents' answers are; once all `is_over`."""
        return tuple(stage for stage in self._stages if self._calls.get(stage) and self._ends(stage))

    @property
    def ends_with_host(self) -> bool:
        """Whether nothing follows the host itself, so that its own outputs are the answer."""
        return self._host != HOME and all(
            self._edge_calls[number] == 0 for number, _ in self._structure.out_of(self._host)
        )

    def _ends(self, stage: str) -> bool:
        if stage in self._relays:
            return True
        return all(self._edge_calls.get(number) == 0 for number, _ in self._structure.out_of(stage))

    def _advance(self) -> list[Release]:
        found = []
        for stage in self._stages:
            if stage not in self._calls:
                self._determine(stage)
            if self._calls.get(stage) and stage not in self._released:
                release = self._release(stage)
                if release is not None:
                    self._released.add(stage)
                    found.append(release)
        return found

    def _determine(self, stage: str) -> None:
        """Find the number of calls of ``stage``, if it can be known, and those of the edges that leave it."""
        numbers = [number for number, _ in self._structure.into(stage)]
        if any(number not in self._edge_calls for number in numbers):
            return
        calls = max((self._edge_calls[number] for number in numbers), default=1)
        self._calls[stage] = self._unfinished[stage] = calls
        if stage not in self._relays:
            self._note_edges(stage, None)

    def _note_edges(self, stage: str, rows: Callable[[str], int] | None) -> None:
        """Find the calls of the edges that leave ``stage``; of scattered ones only with its ``rows``."""
        calls = self._calls[stage]
        number_of_stage = self._structure.rules.stages.index(stage)
        u = drawn_share(self._seed, DRAW_SWITCHES, self._position * 256 + number_of_stage)
        below, chosen = 0.0, False
        for number, edge in self._structure.out_of(stage):
            taken = calls > 0
            if taken and edge.probability is not None:
                below += edge.probability
                taken = not chosen and below > u
                chosen = chosen or taken
            if not taken:
                self._edge_calls[number] = 0
            elif edge.scatter:
                if rows is not None:
                    self._edge_calls[number] = rows(edge.inputs[0][1])
            elif edge.fanout == 1 and calls == 1:
                self._edge_calls[number] = 1
            else:
                share = drawn_share(self._seed, DRAW_EDGES, self._position * 256 + number)
                self._edge_calls[number] = drawn_calls(edge.fanout, calls, share)

    def _release(self, stage: str) -> Release | None:
        """Return the release of ``stage`` if its inputs are there."""
        calls = self._calls[stage]
        taken = [(number, edge) for number, edge in self._structure.into(stage) if self._edge_calls[number]]
        if stage not in self._structure.rules.any_joins:
            if any(self._unfinished[edge.source] for _, edge in taken):
                return None
            return Release(stage=stage, calls=calls, edges=tuple(number for number, _ in taken))
        numbers = {edge.source: number for number, edge in reversed(taken)}
        came = next((source for source in self._first_calls if source in numbers), None)
        if came is None:
            return None
        return Release(stage=stage, calls=calls, edges=(numbers[came],), first_call=self._first_calls[came])
