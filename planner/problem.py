"""The planning problem: everything a plan is made from, cross-checked before any solver sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from planner.settings import Settings
from plans.cluster import Cluster
from plans.demand import Demand, ServiceDemand
from plans.errors import Fault, InvalidInput
from plans.plan import Plan
from plans.service import FrequencyService, Service, Services, check_against_cluster
from profiles.library import ProfileLibrary

__all__ = ["Problem", "check", "offered_rps"]


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
    """

    cluster: Cluster
    services: Services
    profiles: ProfileLibrary
    demand: Demand
    current: Plan | None = None
    settings: Settings = field(default_factory=Settings)


def check(problem: Problem) -> tuple[str, ...]:
    """Cross-check the documents of ``problem`` and return warnings.

    Raises:
        InvalidInput: With every fault at once: services whose models have no profile for any GPU type present, demand
            for unknown services, pins and forbids to unknown places.
    """
    faults = [*_unprofiled(problem), *_unknown_demand(problem)]
    try:
        check_against_cluster(problem.services, problem.cluster, where="services")
    except InvalidInput as error:
        faults.extend(error.faults)
    if faults:
        raise InvalidInput(faults)
    return tuple(
        f"{service.name}: the demand does not name it; planned for 0 requests per second"
        for service in problem.services.services
        if problem.demand.of(service.name) is None
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
