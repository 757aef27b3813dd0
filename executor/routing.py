"""Where requests go: the routing table, and the rotation over its targets. No input or output here.

By default the share of a target is its weight in the plan, corrected by the wait that its group reports
(`plans.dispatch.corrected_weight`, spread by `plans.dispatch.next_replica`: smooth weighted round robin). A target that
is not healthy counts as weight 0, so the others take its requests. When none is healthy, those that are only in doubt,
because their agent is slow to answer, are better than none. The rules are those of the evaluator's settings of the same
names (docs/evaluator.md, section 4).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from executor.group_waits import GroupWaits
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
from plans.dispatch import corrected_weight, least, next_replica
from plans.errors import StalePlan

__all__ = ["NodeView", "Router", "Routing", "view_of"]

Routing = Literal["corrected", "least-finish", "weighted"]
"""By weight corrected by the wait, to the least expected finish, or by weight alone."""

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

    def __init__(self, routes: ServiceRoutes, counted: Mapping[str, tuple[int, int]]) -> None:
        self.routes = routes
        self.credit = [0.0] * len(routes.targets)
        self.problems = ["not reached yet"] * len(routes.targets)
        self.weights = [0.0] * len(routes.targets)
        self.doubtful = [0.0] * len(routes.targets)
        before = [counted.get(target.group, (0, 0)) for target in routes.targets]
        self.sent = [sent for sent, _ in before]
        self.failed = [failed for _, failed in before]

    def counted(self) -> dict[str, tuple[int, int]]:
        """Return how many requests were sent to each group, and how often it failed."""
        groups = (target.group for target in self.routes.targets)
        return dict(zip(groups, zip(self.sent, self.failed, strict=True), strict=True))

    def judge(self, position: int, problem: str, *, doubtful: bool = False) -> None:
        was_healthy = not self.problems[position] or self.doubtful[position] > 0
        weight = self.routes.targets[position].weight
        self.problems[position] = problem
        self.weights[position] = 0.0 if problem else weight
        self.doubtful[position] = weight if doubtful and was_healthy else 0.0

    def next(self, weights: list[float], waits: GroupWaits, without: str, routing: Routing) -> int:
        targets, deadline_s = self.routes.targets, self.routes.deadline_s
        if len(targets) == 1:
            return 0 if weights[0] > 0 and targets[0].group != without else -1
        usable = [0.0 if target.group == without else weight for target, weight in zip(targets, weights, strict=True)]
        if routing == "least-finish":
            return least(usable, [waits.wait_s(target.group) + target.alone_s for target in targets])
        if routing == "corrected" and deadline_s > 0:
            usable = [
                corrected_weight(weight, waits.wait_s(target.group), deadline_s)
                for target, weight in zip(targets, usable, strict=True)
            ]
        return next_replica(usable, self.credit)


class Router:
    """The table in force with the rotation, health and counters of its targets.

    A target is out of rotation until a `NodeView` says that it serves. Not safe for use from several threads.

    Args:
        routing: The rule.
        clock: The time in seconds.
    """

    def __init__(self, routing: Routing = "corrected", *, clock: Callable[[], float] = time.monotonic) -> None:
        self._routing: Routing = routing
        self._table: RoutingTable | None = None
        self._rotations: dict[str, _Rotation] = {}
        self._counted: dict[str, dict[str, tuple[int, int]]] = {}
        self._views: dict[Backend, NodeView] = {}
        self._waits = GroupWaits(clock)
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

    def losses(self, table: RoutingTable) -> tuple[str, ...]:
        """Return the services that can be served now and that ``table`` would leave without a healthy target, and why.

        By what has been observed of the backends of both tables. A service that the table gives no target waits for its
        replicas to be loaded, which is no loss to find out here.
        """
        views = {backend.node: self._views.get(backend) for backend in table.backends}
        found = []
        for routes in table.services:
            now = self._rotations.get(routes.service)
            if now is None or not any(now.weights):
                continue
            problems = {
                target.group: view.problem_of(routes.stage or routes.service, target) if view else "not reached yet"
                for target in routes.targets
                for view in (views[target.node],)
            }
            if problems and all(problems.values()):
                whys = "; ".join(f"{group}: {problem}" for group, problem in problems.items())
                found.append(f"{routes.service!r} would have nobody to serve it ({whys})")
        return tuple(found)

    def install(self, table: RoutingTable) -> None:
        """Put ``table`` in force, all at once. The same generation may be installed again, with other targets.

        What is known about a backend stays known as long as the table names it; credit starts anew, counters never do.

        Raises:
            StalePlan: The table may not follow the one in force (`check_generation`).
        """
        self.check_generation(table)
        self._table = table
        self._counted = self.counted()
        self._rotations = {
            routes.service: _Rotation(routes, self._counted.get(routes.service, {})) for routes in table.services
        }
        self._views = {backend: view for backend, view in self._views.items() if backend in table.backends}
        self._waits.keep({target.group for routes in table.services for target in routes.targets})
        for backend, view in self._views.items():
            self._judge(backend.node, view)

    def observe(self, backend: Backend, view: NodeView) -> None:
        """Take in what is known about ``backend`` now; targets on it enter or leave the rotation.

        A backend that the table in force does not name may be observed ahead of the table that will.
        """
        self._views[backend] = view
        for group, wait_s in view.waits_s.items():
            self._waits.note(group, wait_s)
        if self._table is not None and backend in self._table.backends:
            self._judge(backend.node, view)

    def note_wait(self, group: str, wait_s: float) -> None:
        """Take in the seconds that a request which arrives at ``group`` now would wait."""
        self._waits.note(group, wait_s)

    def wait_s(self, group: str) -> float:
        """Return the seconds that a request sent to ``group`` now is expected to wait; 0 while nothing is known."""
        return self._waits.wait_s(group)

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
                return self._sent(rotation, position)
        chosen = self._next(rotation, without)
        if chosen is not None:
            self._streams[place] = chosen.group
            if len(self._streams) > _MOST_STREAMS:
                del self._streams[next(iter(self._streams))]
        return chosen

    def _next(self, rotation: _Rotation, without: str) -> Target | None:
        position = rotation.next(rotation.weights, self._waits, without, self._routing)
        if position < 0:
            position = rotation.next(rotation.doubtful, self._waits, without, self._routing)
        return self._sent(rotation, position) if position >= 0 else None

    def _sent(self, rotation: _Rotation, position: int) -> Target:
        target = rotation.routes.targets[position]
        rotation.sent[position] += 1
        self._waits.sent(target.group, target.share_s)
        return target

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
        addresses = {backend.node: backend.address for backend in self._table.backends} if self._table else {}
        for service, rotation in self._rotations.items():
            for position, target in enumerate(rotation.routes.targets):
                yield TargetState(
                    service=service,
                    group=target.group,
                    healthy=not rotation.problems[position],
                    reason=rotation.problems[position],
                    sent=rotation.sent[position],
                    failed=rotation.failed[position],
                    stage=rotation.routes.stage,
                    address=addresses[target.node],
                )

    def counted(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Return the requests sent to each target, by service and group, and how often it failed.

        Targets that are gone are among them, so that no sum over targets ever falls.
        """
        now = {service: rotation.counted() for service, rotation in self._rotations.items()}
        return {name: self._counted.get(name, {}) | now.get(name, {}) for name in {**self._counted, **now}}

    def _judge(self, node: str, view: NodeView) -> None:
        for service, rotation in self._rotations.items():
            for position, target in enumerate(rotation.routes.targets):
                if target.node == node:
                    problem = view.problem_of(rotation.routes.stage or service, target)
                    rotation.judge(position, problem, doubtful=view.doubtful)
