"""Where requests go: the routing table, and the rotation over its targets. No input or output here.

The share of a target is its weight in the plan. A target that is not healthy counts as weight 0, so the others take its
requests in proportion to their weights (`plans.dispatch.next_replica`: smooth weighted round robin). When none is
healthy, those that are only in doubt, because their agent is slow to answer, are better than none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from executor.state import (
    AgentState,
    Backend,
    Phase,
    ReplicaKey,
    ReplicaState,
    RoutingTable,
    ServiceRoutes,
    Target,
    TargetState,
)
from plans.dispatch import next_replica
from plans.errors import StalePlan

__all__ = ["NodeView", "Router", "corrected_weight", "view_of"]

_WHY_NOT = {
    Phase.LOADING: "it is being loaded",
    Phase.STAGED: "it is loaded, but its plan is not committed",
    Phase.DRAINING: "it is being drained",
    Phase.FAILED: "it failed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """What the gateway knows about a node right now.

    Attributes:
        problem: Why the node cannot be used at all; empty when its agent answers.
        doubtful: Whether the problem is only that its agent did not answer in time: it may be busy, or gone.
        replicas: For each replica that the agent reports, why it takes no requests; empty when it serves.
        waits_s: For each group, the seconds until a request that arrives now would start.
    """

    problem: str = ""
    doubtful: bool = False
    replicas: Mapping[ReplicaKey, str] = field(default_factory=dict)
    waits_s: Mapping[str, float] = field(default_factory=dict)

    def problem_of(self, service: str, target: Target) -> str:
        """Return why ``target`` takes no requests of ``service``; empty when it does."""
        if self.problem:
            return self.problem
        key = ReplicaKey(group=target.group, service=service, variant=target.variant)
        return self.replicas.get(key, "the agent does not run this replica")


def view_of(node: str, state: AgentState) -> NodeView:
    """Return what an agent's answer says about ``node``; an agent of another node counts as a problem."""
    if state.node != node:
        return NodeView(problem=f"the agent at this address is that of node {state.node!r}")
    if state.drained:
        return NodeView(problem="its node is drained; `foreplan undrain` takes it back")
    return NodeView(
        replicas={replica.key: _problem(replica) for replica in state.replicas},
        waits_s={replica.key.group: replica.expected_wait_s for replica in state.replicas},
    )


def corrected_weight(weight: float, wait_s: float, deadline_s: float) -> float:
    """Return the weight of a target now: that of the plan, less the part of the deadline that would be spent waiting.

    A target whose queue takes the whole deadline keeps a twentieth, so that its recovery is noticed by what it serves.
    """
    if wait_s <= 0 or deadline_s <= 0:
        return weight
    return weight * max(_LEAST_PART, 1.0 - wait_s / deadline_s)


_LEAST_PART = 0.05
_MOST_STREAMS = 65_536
"""Streams that are followed; beyond it those without a frame for longest are routed anew."""


def _problem(replica: ReplicaState) -> str:
    if replica.phase is Phase.SERVING:
        return ""
    why = _WHY_NOT[replica.phase]
    return f"{why}: {replica.reason}" if replica.reason else why


class _Rotation:
    """The targets of one service with their credit and health."""

    __slots__ = ("credit", "doubtful", "failed", "problems", "routes", "sent", "weights")

    def __init__(self, routes: ServiceRoutes) -> None:
        self.routes = routes
        self.credit = [0.0] * len(routes.targets)
        self.problems = ["not reached yet"] * len(routes.targets)
        self.weights = [0.0] * len(routes.targets)
        self.doubtful = [0.0] * len(routes.targets)
        self.sent = [0] * len(routes.targets)
        self.failed = [0] * len(routes.targets)

    def judge(self, position: int, problem: str, *, doubtful: bool = False) -> None:
        was_healthy = not self.problems[position] or self.doubtful[position] > 0
        weight = self.routes.targets[position].weight
        self.problems[position] = problem
        self.weights[position] = 0.0 if problem else weight
        self.doubtful[position] = weight if doubtful and was_healthy else 0.0

    def next(self, weights: list[float], waits_s: Mapping[str, float], without: str) -> int:
        targets = self.routes.targets
        if len(targets) == 1:
            return 0 if weights[0] > 0 and targets[0].group != without else -1
        corrected = [
            0.0
            if target.group == without
            else corrected_weight(weight, waits_s.get(target.group, 0.0), self.routes.deadline_s)
            for target, weight in zip(targets, weights, strict=True)
        ]
        return next_replica(corrected, self.credit)

    def least_wait_s(self, waits_s: Mapping[str, float]) -> float:
        pairs = zip(self.routes.targets, self.weights, strict=True)
        return min((waits_s.get(target.group, 0.0) for target, weight in pairs if weight > 0), default=0.0)


class Router:
    """The table in force with the rotation, health and counters of its targets.

    A target is out of rotation until a `NodeView` says that it serves. Not safe for use from several threads.
    """

    def __init__(self) -> None:
        self._table: RoutingTable | None = None
        self._rotations: dict[str, _Rotation] = {}
        self._views: dict[Backend, NodeView] = {}
        self._waits_s: dict[str, float] = {}
        self._streams: dict[tuple[str, str], str] = {}

    @property
    def table(self) -> RoutingTable | None:
        """The table in force; None before the first."""
        return self._table

    @property
    def services(self) -> tuple[str, ...]:
        """Names of the services routed, in the table's order."""
        return tuple(self._rotations)

    def check_generation(self, table: RoutingTable) -> None:
        """Refuse a table that may not follow the one in force.

        Raises:
            StalePlan: It is of an older generation, or of another plan that claims the same generation.
        """
        current = self._table
        if current is None or table.generation > current.generation:
            return
        refused = f"routing table of generation {table.generation}"
        if table.generation < current.generation:
            raise StalePlan(f"{refused}: generation {current.generation} is in force already")
        if table.placement_digest != current.placement_digest:
            raise StalePlan(f"{refused}: another plan has this generation; two controllers were at work")

    def install(self, table: RoutingTable) -> None:
        """Put ``table`` in force, all at once. The same generation may be installed again, with other targets.

        What is known about a backend stays known as long as the table names it; credit and counters start anew.

        Raises:
            StalePlan: The table may not follow the one in force (`check_generation`).
        """
        self.check_generation(table)
        self._table = table
        self._rotations = {routes.service: _Rotation(routes) for routes in table.services}
        self._views = {backend: view for backend, view in self._views.items() if backend in table.backends}
        groups = {target.group for routes in table.services for target in routes.targets}
        self._waits_s = {group: wait_s for group, wait_s in self._waits_s.items() if group in groups}
        for backend, view in self._views.items():
            self._judge(backend.node, view)

    def observe(self, backend: Backend, view: NodeView) -> None:
        """Take in what is known about ``backend`` now; targets on it enter or leave the rotation.

        A backend that the table in force does not name may be observed ahead of the table that will.
        """
        self._views[backend] = view
        self._waits_s.update(view.waits_s)
        if self._table is not None and backend in self._table.backends:
            self._judge(backend.node, view)

    def note_wait(self, group: str, wait_s: float) -> None:
        """Take in the seconds that a request which arrives at ``group`` now would wait."""
        self._waits_s[group] = wait_s

    def wait_s(self, group: str) -> float:
        """Return the wait that ``group`` reported last, seconds; 0 when it has not."""
        return self._waits_s.get(group, 0.0)

    def least_wait_s(self, service: str) -> float:
        """Return the shortest wait, in seconds, that a usable target of ``service`` has reported; 0 when none did."""
        rotation = self._rotations.get(service)
        return rotation.least_wait_s(self._waits_s) if rotation else 0.0

    def suspect(self, service: str, group: str, problem: str) -> None:
        """Take a target out of the rotation until its node is observed again, and count a failure against it."""
        rotation = self._rotations.get(service)
        for position, target in enumerate(rotation.routes.targets if rotation else ()):
            if rotation and target.group == group:
                rotation.failed[position] += 1
                rotation.judge(position, problem)

    def routes(self, service: str) -> ServiceRoutes | None:
        """Return the routes of ``service``; None when the table does not name it."""
        rotation = self._rotations.get(service)
        return rotation.routes if rotation else None

    def choose(self, service: str, *, without: str = "", stream: str = "") -> Target | None:
        """Return the target whose turn it is, passing over the group ``without``; None when none can be used.

        Frames of one ``stream`` go where its first frame went, for as long as that target takes requests.
        """
        rotation = self._rotations.get(service)
        if rotation is None:
            return None
        if stream:
            return self._follow(rotation, without, stream)
        return self._next(rotation, without)

    def _follow(self, rotation: _Rotation, without: str, stream: str) -> Target | None:
        place = (rotation.routes.service, stream)
        group = self._streams.pop(place, "")
        for position, target in enumerate(rotation.routes.targets):
            if target.group == group != without and rotation.weights[position] > 0:
                self._streams[place] = group  # the last used go to the end
                rotation.sent[position] += 1
                return target
        chosen = self._next(rotation, without)
        if chosen is not None:
            self._streams[place] = chosen.group
            if len(self._streams) > _MOST_STREAMS:
                del self._streams[next(iter(self._streams))]
        return chosen

    def _next(self, rotation: _Rotation, without: str) -> Target | None:
        position = rotation.next(rotation.weights, self._waits_s, without)
        if position < 0:
            position = rotation.next(rotation.doubtful, self._waits_s, without)
        if position < 0:
            return None
        rotation.sent[position] += 1
        return rotation.routes.targets[position]

    def problem(self, service: str) -> str:
        """Return why no target of ``service`` can be chosen; empty when one can."""
        rotation = self._rotations.get(service)
        if rotation is None:
            return "the current plan has no such service"
        if any(rotation.weights):
            return ""
        if not rotation.routes.targets:
            return "no replica is loaded yet"
        pairs = zip(rotation.routes.targets, rotation.problems, strict=True)
        return "; ".join(f"{target.group}: {problem}" for target, problem in pairs)

    @property
    def ready(self) -> bool:
        """Whether a table is in force and every service in it has a healthy target."""
        return self._table is not None and all(any(rotation.weights) for rotation in self._rotations.values())

    def health(self) -> Iterator[TargetState]:
        """Yield the state of every target, in the table's order."""
        for service, rotation in self._rotations.items():
            for position, target in enumerate(rotation.routes.targets):
                yield TargetState(
                    service=service,
                    group=target.group,
                    healthy=not rotation.problems[position],
                    reason=rotation.problems[position],
                    sent=rotation.sent[position],
                    failed=rotation.failed[position],
                )

    def _judge(self, node: str, view: NodeView) -> None:
        for service, rotation in self._rotations.items():
            for position, target in enumerate(rotation.routes.targets):
                if target.node == node:
                    rotation.judge(position, view.problem_of(service, target), doubtful=view.doubtful)
