"""What-if: the same inputs with nodes added or removed, or demand scaled, and what that changes of a plan."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from foreplan.planning import Inputs
from plans.cluster import Cluster, Node, NodeGpus
from plans.demand import Demand, Rate, ServiceDemand
from plans.errors import Fault, InvalidInput
from plans.plan import Plan
from plans.service import Services, check_against_cluster

__all__ = ["Difference", "changed", "difference"]

_NODE = re.compile(r"^(?P<name>[^:=*@]+)[:=](?P<type>[^:*@]+)(?:\*(?P<count>[0-9]+))?(?:@(?P<zone>.+))?$")


def changed(
    inputs: Inputs, *, add: Sequence[str] = (), remove: Sequence[str] = (), scale_demand: float = 1.0
) -> Inputs:
    """Return ``inputs`` with the changes.

    Args:
        inputs: The documents as they are.
        add: Nodes as ``name:type``, ``name:type*gpus`` or ``name:type*gpus@zone``, with a type of the cluster.
        remove: Names of nodes.
        scale_demand: Factor of every rate and number of streams.

    Raises:
        InvalidInput: A node is malformed, of an unknown type, there already or not there; a service is pinned to
            removed places alone; no node is left; or the factor is not positive. All faults at once.

    Pins and forbids of a removed node go with it.
    """
    faults: list[Fault] = []
    known = {node.name for node in inputs.cluster.nodes}
    for name in remove:
        if name not in known:
            expected = f"one of the nodes {', '.join(sorted(known))}"
            faults.append(Fault(where="command line", field="--remove", found=repr(name), expected=expected))
    added: list[Node] = []
    for text in add:
        if (node := _node(text, inputs.cluster, known, faults)) is not None:
            added.append(node)
            known.add(node.name)
    nodes = (*(node for node in inputs.cluster.nodes if node.name not in remove), *added)
    if not nodes:
        faults.append(Fault(where="command line", field="--remove", found="every node", expected="a node that is left"))
    if not 0 < scale_demand < float("inf"):
        expected = "a factor above 0"
        faults.append(Fault(where="command line", field="--scale-demand", found=str(scale_demand), expected=expected))
    services = _without(inputs.services, set(remove), faults)
    if faults:
        raise InvalidInput(faults)
    cluster = inputs.cluster.model_copy(update={"nodes": nodes})
    check_against_cluster(services, cluster, where="services")
    return replace(inputs, cluster=cluster, services=services, demand=_scaled(inputs.demand, scale_demand))


def _without(services: Services, removed: set[str], faults: list[Fault]) -> Services:
    """Return ``services`` without pins and forbids on removed nodes; a service with no pin left is a fault."""
    if not removed:
        return services
    kept = []
    for service in services.services:
        places = {
            field: tuple(place for place in named if place.partition("/")[0] not in removed)
            for field, named in (("pin", service.pin), ("forbid", service.forbid))
        }
        if service.pin and not places["pin"]:
            remedy = "keep one of these nodes, or pin the service elsewhere too"
            found, expected = ", ".join(service.pin), f"a place to be left that {service.name} is pinned to"
            where = "command line"
            faults.append(Fault(where=where, field="--remove", found=found, expected=expected, remedy=remedy))
        kept.append(service.model_copy(update=places))
    return services.model_copy(update={"services": tuple(kept)})


def _node(text: str, cluster: Cluster, known: set[str], faults: list[Fault]) -> Node | None:
    match = _NODE.match(text)
    if match is None:
        expected = "NAME:GPU_TYPE*COUNT, such as node-x:h100-80gb*8"
        faults.append(Fault(where="command line", field="--add", found=repr(text), expected=expected))
        return None
    if match["type"] not in cluster.gpu_types:
        expected = f"a GPU type of the cluster ({', '.join(sorted(cluster.gpu_types))})"
        faults.append(Fault(where="command line", field="--add", found=repr(match["type"]), expected=expected))
        return None
    if match["name"] in known:
        expected = "a name that no node has"
        faults.append(Fault(where="command line", field="--add", found=repr(match["name"]), expected=expected))
        return None
    try:
        gpus = NodeGpus(type=match["type"], count=int(match["count"] or 1))
        return Node(name=match["name"], gpus=gpus, zone=match["zone"] or "")
    except ValidationError as error:
        expected = "; ".join(f"{detail['loc'][0]}: {detail['msg']}" for detail in error.errors())
        faults.append(Fault(where="command line", field="--add", found=repr(text), expected=expected))
        return None


def _scaled(demand: Demand, factor: float) -> Demand:
    if factor == 1.0:
        return demand
    return demand.model_copy(
        update={
            "services": tuple(_scaled_service(each, factor) for each in demand.services),
            "scenarios": tuple(
                each.model_copy(update={"rate_rps": {name: rate * factor for name, rate in each.rate_rps.items()}})
                for each in demand.scenarios
            ),
        }
    )


def _scaled_service(demand: ServiceDemand, factor: float) -> ServiceDemand:
    rates = tuple(
        Rate(mean=rate.mean * factor, quantiles={level: value * factor for level, value in rate.quantiles.items()})
        for rate in demand.rate_rps
    )
    streams = None if demand.streams is None else round(demand.streams * factor)
    return demand.model_copy(update={"rate_rps": rates, "streams": streams})


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What changes from the plan for the inputs as they are to the plan for the changed ones."""

    objective: str
    base: dict[str, float]
    changed: dict[str, float]

    def rows(self) -> Iterator[tuple[str, float, float, float]]:
        """Yield (what, base, changed, by how much), what is equal left out but for the first three."""
        for position, (name, value) in enumerate(self.base.items()):
            other = self.changed.get(name, 0.0)
            if position < 3 or abs(other - value) > 1e-9 * max(1.0, abs(value)):
                yield name, value, other, other - value


def difference(base: Plan, other: Plan, base_cluster: Cluster, other_cluster: Cluster) -> Difference:
    """Compare two plans: first objective, GPUs, cost, and the rate served of every service."""
    first = base.solver.tiers[0].name if base.solver.tiers else "goodput"
    return Difference(
        objective=first, base=_figures(base, base_cluster, first), changed=_figures(other, other_cluster, first)
    )


def _figures(plan: Plan, cluster: Cluster, objective: str) -> dict[str, float]:
    cost = sum(len(group.gpus) * cluster.gpu_type_of(group.node).cost_per_hour for group in plan.groups)
    served: dict[str, float] = {f"{each.service} (rps)": 0.0 for each in plan.predicted}
    for group in plan.groups:
        for entry in group.loadout:
            served[f"{entry.service} (rps)"] = served.get(f"{entry.service} (rps)", 0.0) + entry.rate_rps
    return {objective: plan.solver.objective, "GPUs": float(plan.gpus_used), "cost per hour": cost, **served}
