"""What an apply has to do, computed from the plan and the state of every peer. No input or output here.

The generation with the highest number that any peer has committed is the live one, and its digest says which plan that
is. An apply that was cut short between the agents' commits and the flip leaves agents ahead of the gateways; requests
still follow the old routes then, so a plan made against those is not stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from executor.assignment import routing_table
from executor.state import AgentState, Backend, DesiredState, GatewayState, Phase, ReplicaKey, TargetState
from plans.cluster import Cluster
from plans.errors import Fault, InvalidInput
from plans.plan import Plan, Prior

__all__ = [
    "Fresh",
    "InForce",
    "Live",
    "ReplicaChange",
    "Stale",
    "Standing",
    "assess",
    "changes",
    "check_plan",
    "check_rotation",
    "is_at",
    "left_over",
    "live_prior",
    "not_serving",
    "replicas_of",
    "stale",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """State of every peer: agents by node name, gateways by address."""

    agents: Mapping[str, AgentState]
    gateways: Mapping[str, GatewayState]

    @property
    def peers(self) -> tuple[AgentState | GatewayState, ...]:
        """State of every peer."""
        return (*self.agents.values(), *self.gateways.values())

    @property
    def generation(self) -> int:
        """The highest generation that any peer has committed; 0 on an untouched cluster."""
        return max((state.generation for state in self.peers), default=0)

    @property
    def last_generation(self) -> int:
        """The highest generation that any peer has seen, committed or staged; 0 on an untouched cluster."""
        seen = [state.generation for state in self.peers]
        return max([*seen, *(state.staged_generation for state in self.agents.values())], default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fresh:
    """The plan follows what is live: apply it as ``generation``."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """The plan is live already, as ``generation``. ``left_over`` says what is not as it should be, a line each."""

    generation: int
    left_over: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stale:
    """Something else is live than what the plan was made against."""

    problem: str


Standing = Fresh | InForce | Stale
"""How a plan stands to what is live."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ReplicaChange:
    """What an apply does to one replica of a node."""

    node: str
    key: ReplicaKey
    action: Literal["load", "keep", "unload"]


def check_rotation(plan: Plan, live: Live, *, plan_name: str = "plan") -> None:
    """Refuse a plan by which a service that is served now would run on drained nodes only.

    Raises:
        InvalidInput: There are such services; with all of them.
    """
    served = {target.service for door in live.gateways.values() for target in door.targets if target.healthy}
    drained = {node for node, agent in live.agents.items() if agent.drained}
    faults = []
    for service, routes in plan.routes.items():
        nodes = sorted({plan.group(route.group).node for route in routes})
        if service in served and nodes and drained.issuperset(nodes):
            expected = "a node in rotation: drained ones get no requests"
            remedy = f"run `foreplan undrain {nodes[0]}` first, or plan the service elsewhere"
            found = ", ".join(nodes)
            faults.append(
                Fault(where=plan_name, field=f"routes.{service}", found=found, expected=expected, remedy=remedy)
            )
    if faults:
        raise InvalidInput(faults)


def check_plan(plan: Plan, cluster: Cluster, *, plan_name: str = "plan", cluster_name: str = "cluster") -> None:
    """Check that every node and device of ``plan`` exists in ``cluster``, and that every node has an address.

    Faults call the two documents by ``plan_name`` and ``cluster_name``.

    Raises:
        InvalidInput: The plan is for another cluster, or an address is missing; all faults at once.
    """
    faults = list(_cluster_faults(plan, cluster, plan_name, cluster_name))
    if faults:
        raise InvalidInput(faults)


def _cluster_faults(plan: Plan, cluster: Cluster, plan_name: str, cluster_name: str) -> Iterator[Fault]:
    counts = {node.name: node.gpus.count for node in cluster.nodes}
    remedy = "this plan was made for another cluster; plan again for this one"
    for position, group in enumerate(plan.groups):
        field = f"groups[{position}]"
        if group.node not in counts:
            known = f"a node of the cluster: {', '.join(counts)}"
            yield Fault(where=plan_name, field=f"{field}.node", found=repr(group.node), expected=known, remedy=remedy)
        else:
            count = counts[group.node]
            for gpu in group.gpus:
                if gpu >= count:
                    expected = f"an index below {count}: {group.node!r} has no more GPUs"
                    yield Fault(
                        where=plan_name, field=f"{field}.gpus", found=str(gpu), expected=expected, remedy=remedy
                    )
    for position, node in enumerate(cluster.nodes):
        if not node.address:
            field = f"nodes[{position}].address"
            yield Fault(
                where=cluster_name, field=field, found="nothing", expected=f"host:port of {node.name!r}'s agent"
            )


def live_prior(live: Live) -> Prior | None:
    """Return generation and digest of what is live; None on a cluster that runs nothing."""
    newest = max(live.peers, key=lambda state: state.generation, default=None)
    if newest is None or newest.generation == 0:
        return None
    return Prior(generation=newest.generation, digest=newest.placement_digest)


def is_at(state: AgentState | GatewayState | DesiredState, place: Prior) -> bool:
    """Say whether a peer has committed, or routes, ``place``; or whether that is what a desired state is of."""
    return (state.generation, state.placement_digest) == (place.generation, place.digest)


def assess(plan: Plan, prior: Prior | None, live: Live, addresses: Mapping[str, str]) -> Standing:
    """Say how ``plan``, made against ``prior``, stands to what is live; ``addresses`` are those of all agents, by node.

    The next generation is one more than any peer has seen, so that a peer which an earlier apply reached with more than
    it committed does not refuse.
    """
    current = live_prior(live)
    if current is not None and current.digest == plan.placement_digest:
        return InForce(generation=current.generation, left_over=left_over(plan, current.generation, live, addresses))
    followable = _followable(current, live)
    if (prior.digest if prior else None) in followable or plan.placement_digest in followable:
        return Fresh(generation=live.last_generation + 1)
    return stale(prior, current)


def stale(prior: Prior | None, current: Prior | None) -> Stale:
    """Return what is wrong with a plan made against ``prior`` where ``current`` is live."""
    made = f"generation {prior.generation} ({_short(prior.digest)})" if prior else "an empty cluster"
    runs = f"generation {current.generation} ({_short(current.digest)})" if current else "nothing"
    return Stale(
        problem=f"the plan was made against {made}, but {runs} is live; plan again with --current set to the live plan"
    )


def _followable(current: Prior | None, live: Live) -> set[str | None]:
    """Return the digests against which a plan may have been made and still be applied; None stands for nothing."""
    if current is None:
        return {None}
    routed = max(live.gateways.values(), key=lambda state: state.generation, default=None)
    return {current.digest, routed.placement_digest if routed is not None and routed.generation else current.digest}


def _short(digest: str) -> str:
    return digest[:19]


def replicas_of(plan: Plan, node: str) -> frozenset[ReplicaKey]:
    """Return the replicas that ``node`` shall run."""
    return frozenset(
        ReplicaKey(group=group.id, service=entry.service, variant=entry.variant)
        for group in plan.groups
        if group.node == node
        for entry in group.loadout
    )


def changes(plan: Plan, live: Live) -> tuple[ReplicaChange, ...]:
    """Return what the plan changes on every node, replica by replica."""
    found = []
    for node, state in live.agents.items():
        wanted = replicas_of(plan, node)
        present = {replica.key for replica in state.replicas if replica.phase is not Phase.FAILED}
        found += [ReplicaChange(node=node, key=key, action="load") for key in wanted - present]
        found += [ReplicaChange(node=node, key=key, action="keep") for key in wanted & present]
        found += [ReplicaChange(node=node, key=key, action="unload") for key in present - wanted]
    return tuple(sorted(found))


def left_over(plan: Plan, generation: int, live: Live, addresses: Mapping[str, str]) -> tuple[str, ...]:
    """Return what keeps the peers from running ``plan`` as ``generation`` and nothing else; empty when they do.

    ``addresses`` are those of all agents, by node: whoever sends to them must know where they are now.
    """
    digest = plan.placement_digest
    found: list[str] = []
    for node, agent in live.agents.items():
        found += [
            f"{node}: {problem}" for problem in _agent_left_over(replicas_of(plan, node), generation, agent, digest)
        ]
        handover = agent.committed.handover if agent.committed else None
        found += _moved(node, handover.backends if handover else (), addresses)
    table = routing_table(plan, addresses, generation)
    wanted = {(routes.service, target.group) for routes in table.services for target in routes.targets}
    for address, gateway in live.gateways.items():
        routed = {(target.service, target.group) for target in gateway.targets}
        if gateway.generation != generation or gateway.placement_digest != digest:
            found.append(f"gateway {address}: routes generation {gateway.generation}, not {generation}")
        elif routed != wanted:
            found.append(f"gateway {address}: routes {len(routed)} of {len(wanted)} targets")
        else:
            known = {Backend(node=_node_of(one), address=one.address) for one in gateway.targets if one.address}
            found += _moved(f"gateway {address}", known, addresses)
    return tuple(found)


def _moved(who: str, backends: Iterable[Backend], addresses: Mapping[str, str]) -> Iterator[str]:
    for backend in sorted(backends, key=lambda one: one.node):
        now = addresses.get(backend.node, backend.address)
        if now != backend.address:
            yield f"{who}: reaches {backend.node} at {backend.address}, not at {now}"


def _node_of(target: TargetState) -> str:
    return target.group.rpartition("/")[0]


def not_serving(plan: Plan, live: Live) -> tuple[str, ...]:
    """Return what of ``plan``, which is live, does not serve now, a line each.

    What operators have drained is passed over.
    """
    drained = {node for node, agent in live.agents.items() if agent.drained}
    found = []
    for node, agent in live.agents.items():
        wanted = frozenset() if agent.drained else replicas_of(plan, node)
        for replica in agent.replicas:
            if replica.key in wanted and replica.phase is not Phase.SERVING:
                why = f": {replica.reason}" if replica.reason else ""
                found.append(f"{node}: {replica.key} is {replica.phase.value}{why}")
    for address, gateway in live.gateways.items():
        found += [
            f"gateway {address} sends nothing of {target.service} to {target.group}: {target.reason}"
            for target in gateway.targets
            if not target.healthy and _node_of(target) not in drained
        ]
    return tuple(found)


def _agent_left_over(wanted: frozenset[ReplicaKey], generation: int, state: AgentState, digest: str) -> Iterator[str]:
    if state.generation != generation or state.placement_digest != digest:
        yield f"has committed generation {state.generation}, not {generation}"
        return
    if state.underway:
        yield "is at a stop on the way to the plan"
    if state.staged_generation not in (0, generation):
        yield f"still holds generation {state.staged_generation} staged"
    present = {replica.key: replica for replica in state.replicas}
    for key in sorted(wanted - present.keys()):
        yield f"does not run {key}"
    for key in sorted(present.keys() - wanted):
        yield f"still runs {key}"
    for key in sorted(wanted & present.keys()):
        if present[key].phase is Phase.FAILED:
            yield f"{key} failed: {present[key].reason}"
