"""From documents to a finished plan: solve, add the transition, check it independently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from evaluator import GATEWAY_ROUTING, evaluate
from evaluator import Settings as Simulation
from foreplan import __version__
from foreplan.polish import PolishSettings, polished
from foreplan.workflow_demand import with_stages
from planner import Infeasible, NoPlanFound, Problem, Settings, Solved, solve
from plans.checker import check_plan
from plans.cluster import Cluster
from plans.codec import read_plan
from plans.demand import Demand, ServiceDemand
from plans.documents import read_document
from plans.errors import Fault, InvalidInput
from plans.plan import LatencyPercentiles, Plan, Prediction
from plans.service import Services, check_against_cluster
from plans.transition import transition
from profiles.latency import LatencyModel
from profiles.library import ProfileLibrary
from traces.outcomes import ServiceSummary
from traces.synthesis import Gamma, synthesise
from traces.table import RequestTrace

__all__ = ["Inputs", "make_plan", "settings_of", "verify"]

_SAMPLED_REQUESTS = 20_000
"""Requests that a prediction simulates, over all services, as far as `_MOST_SAMPLED_S` allows."""
_MOST_SAMPLED_S = 3600.0
"""Longest simulated time of a prediction, seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The documents that a plan is made from, checked against each other."""

    cluster: Cluster
    services: Services
    profiles: ProfileLibrary
    demand: Demand
    current: Plan | None = None

    @classmethod
    def read(
        cls, *, cluster: Path, services: Path, profiles: Path, demand: Demand, current: Path | None = None
    ) -> Inputs:
        """Read the files; where ``demand`` names workflows, the demand for their stages stands in their place.

        Raises:
            InvalidInput: A file is wrong, or pins name places that the cluster does not have.
        """
        inventory = read_document(cluster, Cluster)
        wanted = read_document(services, Services)
        check_against_cluster(wanted, inventory, where=str(services))
        return cls(
            cluster=inventory,
            services=wanted,
            profiles=ProfileLibrary.read(profiles),
            demand=with_stages(demand, wanted),
            current=None if current is None else read_plan(current),
        )


def make_plan(
    inputs: Inputs, settings: Settings, polish: PolishSettings | None = None, trace: RequestTrace | None = None
) -> Solved | Infeasible | NoPlanFound:
    """Solve, polish, predict by simulation, order the transition, and have the independent checker verify the result.

    Args:
        inputs: The documents.
        settings: How to plan.
        polish: How to polish; None, or no time for it, leaves the solver's placement.
        trace: Arrivals that the demand was taken from, for the polish to sample from.

    Raises:
        InvalidInput: The documents contradict each other.
        AssertionError: The checker found a promise broken: a bug in the planner, never passed on as a plan.
    """
    problem = Problem(
        cluster=inputs.cluster,
        services=inputs.services,
        profiles=inputs.profiles,
        demand=inputs.demand,
        current=inputs.current,
        settings=settings,
    )
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    result = solve(problem, created_at=created_at, tool_version=__version__)
    if not isinstance(result, Solved):
        return result
    plan = _predicted_by_simulation(result.plan, inputs, settings.seed)
    if polish is not None and polish.time_s > 0:
        plan = polished(problem, plan, polish, trace)
    steps = transition(inputs.current, plan, inputs.cluster)
    plan = plan.model_copy(
        update={
            "settings": {
                name: value for name, value in asdict(settings).items() if isinstance(value, str | int | float)
            },
            "transition": steps.steps,
            "warnings": (*_beyond_forecast(inputs.demand, settings.quantile), *plan.warnings, *steps.warnings),
        }
    )
    broken = verify(plan, inputs.cluster, inputs.services, inputs.profiles, inputs.demand)
    if broken:
        raise AssertionError("the plan breaks its promises: " + "; ".join(map(str, broken)))
    return result.with_plan(plan)


def _beyond_forecast(demand: Demand, level: float) -> tuple[str, ...]:
    """Return a warning for each service whose forecast states quantiles, but none as far out as ``level``."""
    found = []
    for one in demand.services:
        stated = [float(key) for rate in one.rate_rps for key in rate.quantiles]
        if stated and not min(stated) <= level <= max(stated):
            nearest = max(stated) if level > max(stated) else min(stated)
            found.append(f"{one.service}: quantile {level:g} is planned at {nearest:g}, the outermost that is forecast")
    return tuple(found)


def _predicted_by_simulation(plan: Plan, inputs: Inputs, seed: int) -> Plan:
    """Return ``plan`` with attainment and latency from the simulator, on arrivals sampled from the demand.

    The planner's own prediction is a bound from queueing theory that does not know how batches grow under load.
    Requests are routed as gateways do unless told otherwise. The arrivals are a renewal process at the planned rates
    with the demand's burstiness, every prompt and answer of the demand's tokens. Generation services whose demand
    states no tokens keep the planner's prediction.
    """
    demands = {one.service: one for one in inputs.demand.services}
    offered = {
        one.service: one.offered_rps
        for one in plan.predicted
        if one.offered_rps > 0 and plan.routes.get(one.service) and _has_tokens(inputs, demands.get(one.service), one)
    }
    if not offered:
        return plan
    duration_s = min(_SAMPLED_REQUESTS / sum(offered.values()), _MOST_SAMPLED_S)
    loads = {
        name: Gamma(rate_rps=rate, cv=demands[name].burstiness_cv if name in demands else 1.0)
        for name, rate in offered.items()
    }
    trace = _with_tokens(synthesise(loads, duration_s=duration_s, seed=seed), demands)
    if not len(trace):
        return plan
    generates = any(service.request_class == "generation" for service in inputs.services.services)
    cluster, profiles = (inputs.cluster, inputs.profiles) if generates else (None, None)
    settings = Simulation(routing=GATEWAY_ROUTING)
    summary = evaluate(plan, inputs.services, trace, settings=settings, cluster=cluster, profiles=profiles).summary
    return plan.model_copy(
        update={
            "predicted": tuple(
                _with_outcome(one, summary.service(one.service)) if one.service in offered else one
                for one in plan.predicted
            )
        }
    )


def _has_tokens(inputs: Inputs, demand: ServiceDemand | None, prediction: Prediction) -> bool:
    """Say whether the requests of a service are known well enough to be sampled."""
    generates = inputs.services.service(prediction.service).request_class == "generation"
    return not generates or (demand is not None and None not in (demand.input_tokens, demand.output_tokens))


def _with_tokens(trace: RequestTrace, demands: Mapping[str, ServiceDemand]) -> RequestTrace:
    """Return ``trace`` with the tokens that the demand states, on average, for each service."""
    frame = trace.frame
    for column in ("input_tokens", "output_tokens"):
        stated = {name: getattr(one, column) for name, one in demands.items()}
        rounded = {name: round(value) for name, value in stated.items() if value is not None}
        if rounded:
            frame[column] = frame["service"].map(rounded).astype("Int64")
    return RequestTrace(frame, duration_s=trace.duration_s)


def _with_outcome(prediction: Prediction, found: ServiceSummary) -> Prediction:
    if found.attainment is None:
        return prediction
    return prediction.model_copy(
        update={
            "goodput_rps": found.attainment * prediction.offered_rps,
            "attainment": found.attainment,
            "latency_s": LatencyPercentiles(p50=found.latency_s.p50, p99=found.latency_s.p99),
        }
    )


def settings_of(plan: Plan) -> Settings:
    """Return the settings that ``plan`` was made with; the defaults where it does not say.

    Raises:
        InvalidInput: The plan states a setting that does not exist, or an impossible value.
    """
    known = {field.name for field in fields(Settings)}
    unknown = sorted(plan.settings.keys() - known)
    if unknown:
        expected = f"settings of this version ({', '.join(sorted(known))})"
        raise InvalidInput.of(expected, where="plan", field="settings", found=", ".join(unknown))
    return Settings(**plan.settings)  # type: ignore[arg-type]  # Settings checks every value itself


def verify(
    plan: Plan, cluster: Cluster, services: Services, profiles: ProfileLibrary, demand: Demand | None = None
) -> Sequence[Fault]:
    """Return every promise that ``plan`` breaks; empty when it is sound.

    ``demand`` is needed only where latency depends on tokens.
    """
    return check_plan(plan, cluster, services, _Figures(profiles=profiles, demand=demand), demand)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    """The profiles as the checker asks for them."""

    profiles: ProfileLibrary
    demand: Demand | None

    def _model(self, service: str, model: str, gpu_type: str, tp: int, pp: int) -> LatencyModel | None:
        tokens = self.demand.of(service) if self.demand else None
        return self.profiles.latency(
            model,
            gpu_type,
            tp,
            pp,
            input_tokens=tokens.input_tokens if tokens else None,
            output_tokens=tokens.output_tokens if tokens else None,
        )

    def memory_bytes(
        self, service: str, model: str, gpu_type: str, tp: int, pp: int, batch: int
    ) -> Sequence[int] | None:
        found = self._model(service, model, gpu_type, tp, pp)
        return None if found is None else found.peak_bytes(batch)

    def latency_s(self, service: str, model: str, gpu_type: str, tp: int, pp: int, batch: int) -> float | None:
        found = self._model(service, model, gpu_type, tp, pp)
        return None if found is None else found.at(batch).mean_s
