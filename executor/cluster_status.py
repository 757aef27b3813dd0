"""What a cluster shall run and what it does run, replica by replica: ``foreplan status``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from executor.apply_plan import Live, is_at, live_prior, replicas_of
from executor.cluster_connection import ClusterConnection
from executor.state import AgentState, GatewayState, Phase, ReplicaKey, ReplicaState
from executor.tls import Dialer
from plans.cluster import Cluster
from plans.plan import Plan, Prior

__all__ = ["ClusterStatus", "PeerStatus", "ReplicaStatus", "cluster_status", "status"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatus:
    """One agent or gateway.

    Attributes:
        name: The node, or the gateway's address.
        address: Where it listens.
        generation: Of the plan that it has; None when it tells nothing.
        ready: Whether everything that it shall serve is served.
        problem: Why it is not as it should be; empty when it is.
        resident_bytes: Memory of an agent and its workers; None where that is not told.
        device_used_bytes: Memory in use on each device of an agent, by whomever; empty where that cannot be told.
    """

    name: str
    address: str
    generation: int | None
    ready: bool
    problem: str
    resident_bytes: int | None = None
    device_used_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One replica, desired and observed.

    Attributes:
        node: Its node.
        group: Its GPU group.
        service: Its service.
        variant: Its model; empty when only a gateway knows of the replica.
        desired: Whether it shall run: by the plan given, else by what its agent has committed of what is live, else by
            the routes in force.
        phase: What its agent reports; None when it reports nothing.
        routed_by: Gateways that would send requests to it now.
        problem: Why desired and observed differ; empty when they do not.
        state: The agent's whole report, with its counters; None when it reports nothing.
    """

    node: str
    group: str
    service: str
    variant: str
    desired: bool
    phase: Phase | None
    routed_by: tuple[str, ...]
    problem: str
    state: ReplicaState | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """The state of a cluster.

    Attributes:
        live: Generation and digest of what is live; None when nothing is, or nobody answers.
        agents: Every node of the cluster, in its order.
        gateways: Every gateway asked, in the order given.
        replicas: Every replica that shall run or does, by node, group and service.
    """

    live: Prior | None
    agents: tuple[PeerStatus, ...]
    gateways: tuple[PeerStatus, ...]
    replicas: tuple[ReplicaStatus, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing differs from what shall be."""
        peers_fine = not any(peer.problem for peer in (*self.agents, *self.gateways))
        return peers_fine and not any(replica.problem for replica in self.replicas)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``status --json``."""
        return {
            "healthy": self.healthy,
            "generation": self.live.generation if self.live else 0,
            "placement_digest": self.live.digest if self.live else "",
            "agents": [_peer_json(peer) for peer in self.agents],
            "gateways": [_peer_json(peer) for peer in self.gateways],
            "replicas": [_replica_json(replica) for replica in self.replicas],
        }


async def status(
    cluster: Cluster,
    gateways: Sequence[str],
    *,
    plan: Plan | None = None,
    timeout_s: float = 5.0,
    dialer: Dialer | None = None,
) -> ClusterStatus:
    """Ask every agent of ``cluster`` and every gateway for its state, and compare it with what shall be.

    Args:
        cluster: The inventory, with the address of every agent.
        gateways: ``host:port`` of each gateway.
        plan: What shall run; without it, what agents have committed and gateways route to.
        timeout_s: Seconds that a peer has to answer. Peers that do not are named in the result.
        dialer: Opens the channels; without one, in the clear.

    Raises:
        InvalidInput: No gateway is named, or an address is none.
    """
    async with ClusterConnection(cluster, gateways, dialer) as connection:
        agents, doors, lost = await connection.states(timeout_s=timeout_s, with_desired=True)
    problems = {name: failure.problem for name, failure in lost.items()}
    return cluster_status(cluster, tuple(dict.fromkeys(gateways)), agents, doors, problems, plan)


def cluster_status(
    cluster: Cluster,
    gateways: Sequence[str],
    agents: Mapping[str, AgentState],
    doors: Mapping[str, GatewayState],
    lost: Mapping[str, str],
    plan: Plan | None,
) -> ClusterStatus:
    """Return the status that the answers of agents (by node) and gateways (by address) add up to.

    ``lost`` gives, by the same names, why a peer did not answer.
    """
    live = live_prior(Live(agents=agents, gateways=doors))
    wanted = plan.placement_digest if plan else (live.digest if live else "")
    return ClusterStatus(
        live=live,
        agents=tuple(
            _peer(node.name, node.address, agents.get(node.name), lost.get(node.name, ""), wanted)
            for node in cluster.nodes
        ),
        gateways=tuple(_peer(name, name, doors.get(name), lost.get(name, ""), wanted) for name in gateways),
        replicas=tuple(_replicas(cluster, agents, doors, lost, plan, live)),
    )


def _peer(name: str, address: str, state: AgentState | GatewayState | None, lost: str, wanted: str) -> PeerStatus:
    if state is None:
        return PeerStatus(name=name, address=address, generation=None, ready=False, problem=f"tells no state: {lost}")
    problem = ""
    if state.placement_digest != wanted:
        problem = f"has generation {state.generation}, which is not the plan; {_remedy(state)}"
    elif isinstance(state, AgentState) and state.underway:
        problem = f"is at a stop on the way to the plan; {_remedy(state, ' to go on')}"
    elif isinstance(state, AgentState) and state.drained:
        problem = "is drained; `foreplan undrain` takes it back into the rotation"
    elif not state.ready and state.generation:
        problem = "is not ready: see its replicas"
    return PeerStatus(
        name=name,
        address=address,
        generation=state.generation,
        ready=state.ready,
        problem=problem,
        resident_bytes=state.resident_bytes if isinstance(state, AgentState) else None,
        device_used_bytes=state.device_used_bytes if isinstance(state, AgentState) else (),
    )


def _remedy(state: AgentState | GatewayState | None, purpose: str = "") -> str:
    if isinstance(state, AgentState) and state.leased_to:
        return f"controller {state.leased_to} is at work"
    return f"run `foreplan apply` again{purpose}"


def _replicas(
    cluster: Cluster,
    agents: Mapping[str, AgentState],
    doors: Mapping[str, GatewayState],
    lost: Mapping[str, str],
    plan: Plan | None,
    live: Prior | None,
) -> list[ReplicaStatus]:
    routed: dict[tuple[str, str], list[str]] = defaultdict(list)
    left_out: dict[tuple[str, str], str] = {}
    for address, door in doors.items():
        for target in door.targets:
            if target.stage:
                continue  # the replica is reported as one of its service
            healthy = routed[target.group, target.service]  # noted where nobody sends too: it is a target
            if target.healthy:
                healthy.append(address)
            else:
                left_out[target.group, target.service] = f"gateway {address} sends it nothing: {target.reason}"
    places = {
        address: {(target.group, target.service) for target in door.targets if not target.stage}
        for address, door in doors.items()
        if live and is_at(door, live)
    }
    found = []
    for node in cluster.nodes:
        agent = agents.get(node.name)
        observed = {replica.key: replica for replica in agent.replicas} if agent else {}
        if plan is not None:
            wanted = set(replicas_of(plan, node.name))
        elif agent and agent.committed and live and is_at(agent, live):
            wanted = set(agent.committed.keys())
        else:
            wanted = _routed_keys(routed.keys(), node.name, observed)
        for key in sorted(observed.keys() | wanted):
            state = observed.get(key)
            found.append(
                ReplicaStatus(
                    node=node.name,
                    group=key.group,
                    service=key.service,
                    variant=key.variant,
                    desired=key in wanted,
                    phase=state.phase if state else None,
                    routed_by=tuple(routed[key.group, key.service]) if key in wanted else (),
                    problem=_difference(key in wanted, state, agent)
                    or left_out.get((key.group, key.service), "")
                    or _unrouted(key, agent, places),
                    state=state,
                )
            )
    return found


def _routed_keys(
    targets: Iterable[tuple[str, str]], node: str, observed: Mapping[ReplicaKey, ReplicaState]
) -> set[ReplicaKey]:
    """Return the replicas of ``node`` that the gateways route to; the variant is what the agent reports, if it does."""
    keys = set()
    for group, service in targets:
        if group.rpartition("/")[0] == node:
            same = {key for key in observed if (key.group, key.service) == (group, service)}
            keys |= same or {ReplicaKey(group=group, service=service, variant="")}
    return keys


def _difference(desired: bool, state: ReplicaState | None, agent: AgentState | None) -> str:
    if agent is None:
        return "its agent does not answer"
    if state is None:
        return f"its agent does not run it; {_remedy(agent)}"
    if not desired:
        if state.phase is Phase.DRAINING:
            return "it has left the plan and drains"
        if agent.staged_generation and not state.left_over:
            how = {Phase.LOADING: "it loads", Phase.FAILED: f"it could not be loaded ({state.reason})"}
            stage = f"{how.get(state.phase, 'it is loaded')} for generation {agent.staged_generation}"
            return f"{stage}, not committed yet; {_remedy(agent)}"
        return f"it is not part of the plan; {_remedy(agent, ' to unload it')}"
    if state.phase is not Phase.SERVING:
        return f"it is {state.phase.value}: {state.reason}" if state.reason else f"it is {state.phase.value}"
    return ""


def _unrouted(key: ReplicaKey, agent: AgentState | None, places: Mapping[str, Collection[tuple[str, str]]]) -> str:
    """Return which gateways, of those that route the live plan, do not route to a replica that it gives a rate."""
    groups = agent.committed.groups if agent and agent.committed else ()
    rated = any(group.key_of(one) == key and one.rate_rps > 0 for group in groups for one in group.replicas)
    missing = [address for address, routed in places.items() if (key.group, key.service) not in routed]
    return f"gateway {', '.join(missing)} does not route to it; {_remedy(agent)}" if rated and missing else ""


def _peer_json(peer: PeerStatus) -> dict[str, Any]:
    return {
        "name": peer.name,
        "address": peer.address,
        "generation": peer.generation,
        "ready": peer.ready,
        "problem": peer.problem,
        "resident_bytes": peer.resident_bytes,
        "device_used_bytes": list(peer.device_used_bytes),
    }


def _replica_json(replica: ReplicaStatus) -> dict[str, Any]:
    counters = ("queued", "running", "completed", "dropped", "failed", "batches", "expected_wait_s", "weight_bytes")
    return {
        "node": replica.node,
        "group": replica.group,
        "service": replica.service,
        "variant": replica.variant,
        "desired": replica.desired,
        "phase": replica.phase.value if replica.phase else None,
        "routed_by": list(replica.routed_by),
        "problem": replica.problem,
        **{name: getattr(replica.state, name) if replica.state else None for name in counters},
    }
