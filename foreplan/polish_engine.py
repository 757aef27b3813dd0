"""Whole plans simulated by the evaluator as the planner's `Scorer`: tokens, and services that call each other.

Slower than the compiled search by orders of magnitude, and the simulation is that of ``foreplan evaluate``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import evaluator
from foreplan.polish_arrivals import Sample
from foreplan.polish_scorers import Served
from foreplan.workflow_demand import mean_calls
from planner import Problem, Scorer, ScoringTables
from planner.arranged import Arrangement
from planner.simulated_scorer import SimulatedScorer
from planner.worth import worth_of_block
from plans.plan import Plan
from plans.service import Services
from traces.outcomes import nearest_rank
from traces.table import RequestTrace

__all__ = ["PlanEngine"]

_WORK = 5_000
"""Requests simulated after which a walk looks at the clock."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class PlanEngine:
    """Simulates plans on blocks of arrivals.

    A request to the first stage of workflows is one of each of them; what they call is requested by nobody else, as far
    as the planned rates say so. An answer in time counts once for every call that it took.

    Attributes:
        name: What simulates, in words for the plan.
        offered: Shape (block, service): requests, and calls of workflows in the mean.
    """

    name = "event simulation of whole plans"

    def __init__(self, tables: ScoringTables, problem: Problem, blocks: Sample) -> None:
        self._tables = tables
        self._problem = problem
        generates = any(each.request_class == "generation" for each in problem.services.services)
        self._profiles = problem.profiles if generates else None
        self._calls = _calls_of(tables, problem.services)
        direct = _direct_shares(tables, problem.services)
        generator = np.random.default_rng(problem.settings.seed)
        self._warmup_s = blocks.warmup_s
        self._traces: list[RequestTrace | None] = []
        offered = []
        for first, last in zip(blocks.first[:-1], blocks.first[1:], strict=True):
            frame = _frame(tables.names, blocks, int(first), int(last), problem)
            frame = _with_instances(frame, problem.services, direct, generator)
            warm = len(frame) and frame["arrival_s"].iloc[-1] >= self._warmup_s
            self._traces.append(RequestTrace(frame) if warm else None)
            offered.append(self._counted(frame["service"][frame["arrival_s"] >= self._warmup_s].value_counts()))
        self.offered: Integers = np.array(offered, dtype=np.int64).reshape(len(offered), len(tables.names))

    def scorer(self, simulated_s: float) -> Scorer:
        """Return the scorer; its blocks last ``simulated_s`` together."""
        return SimulatedScorer(self.name, self._tables.worth, self.offered, simulated_s, self.good, work=_WORK)

    def good(self, arrangement: Arrangement, block: int) -> Integers:
        """Return the requests of ``block`` served in time, shape (service, replica)."""
        now = arrangement.now
        assert self._tables.draft is not None, "the planner asks for whole plans"
        served = self.served(self._tables.draft(arrangement.pairs()), block)
        count = np.maximum(now.replicas, 1)[:, None]
        replica = np.arange(now.slot.shape[1])
        each = served[:, None] // count + (replica < served[:, None] % count)
        found: Integers = np.where(replica < now.replicas[:, None], each, 0)
        return found

    def served(self, plan: Plan, block: int) -> Integers:
        """Return the requests of ``block`` that ``plan`` serves in time, shape (service,)."""
        requests = self._requests(plan, block)
        return self._counted(requests["service"][requests["outcome"] == "good"].value_counts())

    def outcome(self, plan: Plan) -> Served:
        """Return what ``plan`` does on all blocks; latencies of services that are requested by themselves."""
        found = [self._requests(plan, block) for block in range(len(self.offered))]
        good = [self._counted(each["service"][each["outcome"] == "good"].value_counts()) for each in found]
        requests = pd.concat(found)
        latency_s = {name: np.sort(rows.dropna()) for name, rows in requests.groupby("service")["latency_s"]}
        by_service = [latency_s.get(name, np.zeros(0)) for name in self._tables.names]
        return Served(
            good=np.array(good),
            offered=self.offered,
            p50_s=tuple(nearest_rank(each, 50) for each in by_service),
            p99_s=tuple(nearest_rank(each, 99) for each in by_service),
        )

    def _requests(self, plan: Plan, block: int) -> pd.DataFrame:
        trace = self._traces[block]
        if trace is None or not plan.groups:
            return pd.DataFrame({"service": [], "outcome": [], "latency_s": []})
        settings = evaluator.Settings(routing=evaluator.GATEWAY_ROUTING, warmup_s=self._warmup_s)
        return evaluator.evaluate(
            plan,
            self._problem.services,
            trace,
            settings=settings,
            cluster=self._problem.cluster,
            profiles=self._profiles,
        ).requests

    def score(self, plan: Plan) -> float:
        """Return what ``plan`` is worth in all blocks."""
        worth = self._tables.worth
        total = 0.0
        for block, offered in enumerate(self.offered):
            good = self.served(plan, block)
            total += worth_of_block(worth, good, good * worth.weight, offered)
        return total

    def _counted(self, counts: pd.Series[int]) -> Integers:
        """Return the requests and calls of each service that so many rows of each name stand for."""
        calls = np.zeros(len(self._tables.names))
        for name, count in counts.items():
            calls += count * self._calls[str(name)]
        rounded: Integers = np.rint(calls).astype(np.int64)
        return rounded


def _frame(names: tuple[str, ...], blocks: Sample, first: int, last: int, problem: Problem) -> pd.DataFrame:
    """Return the rows of a block with the tokens that the demand states, on average, for each service."""
    service = np.array(names, dtype=object)[blocks.service[first:last]].astype(str)
    frame = pd.DataFrame({"arrival_s": blocks.arrival_s[first:last], "service": service})
    demands = {each.service: each for each in problem.demand.services}
    for column in ("input_tokens", "output_tokens"):
        stated = {name: getattr(one, column) for name, one in demands.items()}
        rounded = {name: round(value) for name, value in stated.items() if value is not None}
        if rounded:
            frame[column] = frame["service"].map(rounded).astype("Int64")
    return frame


def _calls_of(tables: ScoringTables, services: Services) -> dict[str, Floats]:
    """Return the calls of each service by a request of each name, shape (service,)."""
    position = {name: index for index, name in enumerate(tables.names)}
    found = {name: np.eye(len(tables.names))[index] for name, index in position.items()}
    for workflow in services.workflows:
        calls = np.zeros(len(tables.names))
        for name, times in mean_calls(workflow).items():
            calls[position[name]] = times
        found[workflow.name] = calls
    return found


def _roots(services: Services) -> dict[str, list[str]]:
    """Return the workflows that a request to each of their first stages starts."""
    found: dict[str, list[str]] = {}
    for workflow in services.workflows:
        targets = {edge.target for edge in workflow.edges}
        first = next(edge.source for edge in workflow.edges if edge.source not in targets)
        found.setdefault(first, []).append(workflow.name)
    return found


def _direct_shares(tables: ScoringTables, services: Services) -> dict[str, float]:
    """Return the share of each called service's rate that workflows do not account for."""
    rates = dict(zip(tables.names, tables.offered_rps.tolist(), strict=True))
    called: dict[str, float] = {}
    flows = {workflow.name: workflow for workflow in services.workflows}
    roots = _roots(services)
    for first, started in roots.items():
        for each in started:
            for name, times in mean_calls(flows[each]).items():
                if name != first:
                    called[name] = called.get(name, 0.0) + times * rates[first]
    return {name: max(0.0, 1.0 - rate / rates[name]) if rates[name] > 0 else 0.0 for name, rate in called.items()}


def _with_instances(
    frame: pd.DataFrame, services: Services, direct: Mapping[str, float], generator: np.random.Generator
) -> pd.DataFrame:
    """Return ``frame`` with workflows in place of requests to their first stages, and no calls of theirs."""
    if not services.workflows:
        return frame
    share = frame["service"].map(direct).fillna(1.0).to_numpy()
    kept = frame[generator.random(len(frame)) < share]
    parts = [kept[~kept["service"].isin(list(_roots(services)))]]
    for first, started in _roots(services).items():
        parts += [kept[kept["service"] == first].assign(service=name) for name in started]
    return pd.concat(parts).sort_values("arrival_s", kind="stable", ignore_index=True)
