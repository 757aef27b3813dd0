"""What a run of the naive simulator knows, and its events (section 1 of docs/evaluator.md)."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable

from plans import Plan
from tests.evaluator.naive_parts import (
    Group,
    Replica,
    Request,
    Result,
    Scenario,
)
from tests.evaluator.naive_workflow import Instance, tails_of

CHANGE, COMPLETION, ENTRY, TIMER = range(4)
MOST_GPUS = 64  # of a node, in the scenarios of the tests
HOPELESS = "deadline cannot be met"
DISPLACED = "gave way to a full batch"


class State:
    """The state of a run; the sections of the page are added to it as mixed-in classes."""

    def __init__(self, scenario: Scenario) -> None:
        self.told = scenario
        self.services = {service.name: service for service in scenario.services.services}
        self.workflows = {workflow.name: workflow for workflow in scenario.services.workflows}
        self.now = 0.0
        self.events: list[tuple[float, int, int, int, Callable[[], None]]] = []
        self.created = 0
        self.entered = 0
        self.groups: list[Group] = []
        self.followed: dict[tuple[str, str], Replica] = {}
        self.turn_of: dict[str, int] = defaultdict(int)
        self.failed_gpus: set[tuple[str, int]] = set()
        self.requests: list[Request | Instance] = []
        self.ends: dict[int, Result] = {}
        self.last_s = 0.0
        self.arrived: dict[str, int] = defaultdict(int)
        self.plan = scenario.plan
        self.in_transition = False
        self.waiting_plan: Plan | None = None
        self.tails = {name: tails_of(w, scenario.plan) for name, w in self.workflows.items()}

    def note_end(self, position: int, result: Result) -> None:
        self.ends[position] = result
        self.last_s = max(self.last_s, self.now if result.finish_s is None else result.finish_s)

    def at(self, time_s: float, priority: int, action: Callable[[], None], group: Group | None = None) -> None:
        position = group.position if group else 0
        heapq.heappush(self.events, (time_s, priority, position, self.created, action))
        self.created += 1
