"""The planning problem: everything a plan is made from, cross-checked before any solver sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

from planner.settings import Settings
from plans.cluster import Cluster
from plans.demand import Demand, Rate, ServiceDemand
from plans.errors import Fault, InvalidInput
from plans.plan import Plan
from plans.service import FrequencyService, Service, Services, check_against_cluster
from profiles.library import ProfileLibrary

__all__ = ["Problem", "check", "derived_services", "offered_rps", "planned_rps", "service_demands"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What to plan.

    Attributes:
        cluster: The inventory.
        services: What must be served.
        profiles: Measured behaviour of the models.
        demand: Forecast arrival rates.
        current: The running plan, or None when nothing runs.
        settings: How to plan.
        deadline_shares: Per workflow and service the share of the workflow's time that the service is given; of
            workflows that it does not name the split is proportional (`planner.deadlines`).
    """

    cluster: Cluster
    services: Services
    profiles: ProfileLibrary
    demand: Demand
    current: Plan | None = None
    settings: Settings = field(default_factory=Settings)
    deadline_shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def check(problem: Problem) -> tuple[str, ...]:
    """Cross-check the documents of ``problem`` and return warnings.

    Raises:
        InvalidInput: With every fault at once: services whose models have no profile for any GPU type present, demand
            for unknown services, pins and forbids to unknown places.
    """
    faults = [*_unprofiled(problem), *_unknown_demand(problem), *_circular_calls(problem)]
    try:
        check_against_cluster(problem.services, problem.cluster, where="services")
    except InvalidInput as error:
        faults.extend(error.faults)
    if faults:
        raise InvalidInput(faults)
    known = service_demands(problem)
    unnamed = tuple(
        f"{service.name}: the demand does not name it; planned for 0 requests per second"
        for service in problem.services.services
        if service.name not in known
    )
    return (*unnamed, *_left_out(problem))


def derived_services(problem: Problem) -> dict[str, tuple[tuple[str, float], ...]]:
    """Return, for each service that only workflows call, its callers with their calls per request of theirs.

    Those are the services that the demand does not name and that some edge leads to. A request to an entry service
    starts every workflow that begins there.
    """
    named = {each.service for each in problem.demand.services}
    callers: dict[str, list[tuple[str, float]]] = {}
    for workflow in problem.services.workflows:
        for edge in workflow.edges:
            if edge.target not in named:
                callers.setdefault(edge.target, []).append((edge.source, edge.fanout))
    return {name: tuple(found) for name, found in callers.items()}


def service_demands(problem: Problem) -> Mapping[str, ServiceDemand]:
    """Return the demand per service: as stated, or fan-out times that of its callers where only workflows call it.

    Windows are added up at equal quantiles, as if all callers peaked together; burstiness is that of the burstiest.
    """
    found = {each.service: each for each in problem.demand.services}
    derived = derived_services(problem)
    callers = {name: [caller for caller, _ in calls] for name, calls in derived.items()}
    for name in TopologicalSorter(callers).static_order():
        calls = [(found[caller], fanout) for caller, fanout in derived.get(name, ()) if caller in found]
        if calls:
            found[name] = _called(name, calls)
    return found


def planned_rps(problem: Problem) -> dict[str, float]:
    """Return the rate to plan for per service: `offered_rps`, or fan-out times that of its callers."""
    demands = service_demands(problem)
    derived = derived_services(problem)
    quantile = problem.settings.quantile
    rates = {
        service.name: offered_rps(service, demands.get(service.name), quantile)
        for service in problem.services.services
        if service.name not in derived
    }
    callers = {name: [caller for caller, _ in calls] for name, calls in derived.items()}
    for name in TopologicalSorter(callers).static_order():
        if name in derived:
            rates[name] = sum(fanout * rates[caller] for caller, fanout in derived[name])
    return rates


def _called(name: str, calls: list[tuple[ServiceDemand, float]]) -> ServiceDemand:
    levels = sorted({level for demand, _ in calls for rate in demand.rate_rps for level in rate.quantiles}, key=float)
    windows = range(len(calls[0][0].rate_rps))
    return ServiceDemand(
        service=name,
        burstiness_cv=max(demand.burstiness_cv for demand, _ in calls),
        rate_rps=tuple(
            Rate(
                mean=sum(fanout * demand.rate_rps[window].mean for demand, fanout in calls),
                quantiles={
                    level: sum(fanout * demand.rate_rps[window].at(float(level)) for demand, fanout in calls)
                    for level in levels
                },
            )
            for window in windows
        ),
    )


def offered_rps(service: Service, demand: ServiceDemand | None, quantile: float) -> float:
    """Return the rate to plan for: the peak at ``quantile``, or streams times fps where streams are forecast."""
    if demand is None:
        return 0.0
    if isinstance(service, FrequencyService) and demand.streams is not None:
        return demand.streams * service.slo.fps
    return demand.peak_rps(quantile)


def _unprofiled(problem: Problem) -> list[Fault]:
    present = sorted({node.gpus.type for node in problem.cluster.nodes})
    return [
        Fault(
            where="services",
            field=f"services[{position}].variants",
            found=f"service {service.name!r} with models {', '.join(variant.model for variant in service.variants)}",
            expected=f"a profile of one of them on a GPU type present ({', '.join(present)})",
            remedy="measure one with `foreplan profile run`, or import one with `foreplan profile import`",
        )
        for position, service in enumerate(problem.services.services)
        if not any(
            problem.profiles.profile(variant.model, gpu_type) for variant in service.variants for gpu_type in present
        )
    ]


def _left_out(problem: Problem) -> list[str]:
    """Return a warning for each variant that no plan can use, as nobody has profiled it."""
    present = sorted({node.gpus.type for node in problem.cluster.nodes})
    return [
        f"{service.name}: {variant.model} has no profile on a GPU type present ({', '.join(present)}); it is left out"
        for service in problem.services.services
        for variant in service.variants
        if not any(problem.profiles.profile(variant.model, gpu_type) for gpu_type in present)
    ]


def _circular_calls(problem: Problem) -> list[Fault]:
    callers = {name: [caller for caller, _ in calls] for name, calls in derived_services(problem).items()}
    try:
        TopologicalSorter(callers).prepare()
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        expected = "the demand of at least one of them, because their workflows call in a circle"
        return [Fault(where="demand", field="services", found=circle, expected=expected)]
    return []


def _unknown_demand(problem: Problem) -> list[Fault]:
    known = {service.name for service in problem.services.services}
    return [
        Fault(
            where="demand",
            field=f"services[{position}].service",
            found=repr(demand.service),
            expected=f"a service of the services document ({', '.join(sorted(known))})",
        )
        for position, demand in enumerate(problem.demand.services)
        if demand.service not in known
    ]
