"""Sharing a quota of identical replicas between jobs with separable utilities: exact, by dynamic programming.

This is Faro's problem. A job's utility depends on its own replicas alone, so a table (job, replicas) is the whole
problem, and a dynamic program over it finds the optimum of the sum; max-min and fair-sum add a search over the least
and the greatest utility. docs/formulation.md, section 10.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from planner.estimators import Estimator, estimate_latency_s
from planner.fairness import fair_sum
from planner.linear import Floats, LinearModel, ModelBuilder
from planner.settings import DropPenalty, UtilityCurve
from planner.utility import drop_penalty, latency_utility
from plans.errors import InvalidInput

__all__ = ["Allocation", "Goal", "Job", "allocate", "quota_model", "utility_table"]

Goal = Literal["sum", "max-min", "fair-sum"]
"""Sum of weighted utilities; the least utility, then the sum; sum + n (min - max + 1)."""

_DROPS = (0.0, *(step / 200 for step in range(1, 21)))
"""Drop rates that a job may choose where dropping is penalised: up to 0.1 by halves of a percent, with the knots."""

_NEVER = -1e18

_DIGITS = 6
"""Digits of a utility. More are not real, and coefficients of 1e-9 beside 1 made HiGHS prove wrong optima."""

_SAME = 1e-9
"""Utilities that differ by less are the same."""

_PRICES = 24
"""Prices per replica at which fair-sum is bounded."""

_HEURISTIC_KNAPSACKS = 12
"""Boxes whose loosest pair is solved, so that there is a value to prune with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job.

    Attributes:
        name: Its name.
        rate_rps: Predicted arrivals, requests per second.
        request_s: Time of one request on a replica, seconds.
        target_s: SLO on the percentile of the latency, seconds.
        percentile: That percentile, between 0 and 100.
        weight: Factor of its utility in the sum.
        current: Replicas that it has now.
        least: Fewest replicas that it may have.
    """

    name: str
    rate_rps: float
    request_s: float
    target_s: float
    percentile: float = 99.0
    weight: float = 1.0
    current: int = 0
    least: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Replicas and utility per job, and the value of the goal. Of equal values the one with the fewest replicas."""

    replicas: tuple[int, ...]
    utilities: tuple[float, ...]
    value: float


def utility_table(
    jobs: Sequence[Job],
    quota: int,
    *,
    estimator: Estimator = "relaxed-mdc",
    utility: UtilityCurve = "power",
    exponent: float = 4.0,
    penalty: DropPenalty = "none",
) -> Floats:
    """Return the utility of every job at every number of replicas from 0 to ``quota``, shape (job, quota + 1).

    With a drop penalty each entry is the best over what share of its requests the job drops. No replica, no utility.
    Utilities have six digits.
    """
    table = np.zeros((len(jobs), quota + 1))
    drops = (0.0,) if penalty == "none" else _DROPS
    for row, job in zip(table, jobs, strict=True):
        for replicas in range(1, quota + 1):
            if row[replicas - 1] >= 1.0:
                row[replicas:] = 1.0
                break
            row[replicas] = max(
                (1.0 - drop_penalty(penalty, drop))
                * latency_utility(
                    utility,
                    estimate_latency_s(estimator, job.rate_rps * (1.0 - drop), job.request_s, replicas, job.percentile),
                    job.target_s,
                    exponent,
                )
                for drop in drops
            )
    return np.asarray(np.round(np.maximum.accumulate(table, axis=1), _DIGITS), dtype=np.float64)


def allocate(
    jobs: Sequence[Job], table: Floats, quota: int, goal: Goal = "sum", *, change_cost: float = 0.0
) -> Allocation:
    """Return the best allocation of at most ``quota`` replicas, exactly.

    Costs jobs x quota x steps of the curves for the sum; the fair goals solve that a few times over.

    Args:
        jobs: The jobs.
        table: Shape (job, quota + 1): utilities that do not fall with the replicas.
        quota: Replicas in all.
        goal: What to maximise.
        change_cost: Cost, in utility, of every job whose replicas change; only for the sum.

    Raises:
        InvalidInput: The fewest replicas of the jobs exceed the quota.
    """
    least = sum(job.least for job in jobs)
    if least > quota:
        raise InvalidInput.of(f"at most the quota of {quota}", field="jobs.least", found=f"{least} replicas in all")
    if goal == "sum":
        return _sum(jobs, table, quota, change_cost)
    least_value = _max_min(jobs, table, quota)
    if goal == "max-min":
        found = _restricted(jobs, table, quota, least_value, np.inf)
        assert found is not None
        return _allocation(table, found, float(min(table[range(len(jobs)), found], default=0.0)))
    return _fair_sum(jobs, table, quota, least_value)


def quota_model(jobs: Sequence[Job], table: Floats, quota: int, goal: Goal = "sum") -> LinearModel:
    """Return the same problem as an integer program, for a second opinion: (10.1) to (10.4) of docs/formulation.md."""
    builder = ModelBuilder()
    objective: list[float] = []
    chosen, sizes = [], []
    values: list[Floats] = []
    for row, job in zip(table, jobs, strict=True):
        steps = _steps(row, job)
        names = [f"take[{job.name},{replicas}]" for replicas in steps]
        columns = builder.add_variables(names, upper=np.ones(len(steps)), integer=True)
        builder.add_row(f"one[{job.name}]", columns, np.ones(len(steps)), lower=1.0, upper=1.0)
        objective.extend(row[steps] * (job.weight if goal == "sum" else 1.0))
        chosen.append(columns)
        sizes.append(steps.astype(np.float64))
        values.append(row[steps])
    builder.add_row("quota", np.concatenate(chosen), np.concatenate(sizes), upper=float(quota))
    if goal != "sum":
        least, most, one = builder.add_variables(["least", "most", "one"], upper=np.ones(3), integer=False)
        builder.add_row("one", [int(one)], [1.0], lower=1.0)
        for job, columns, worth in zip(jobs, chosen, values, strict=True):
            builder.add_row(f"least[{job.name}]", np.append(columns, least), np.append(worth, -1.0), lower=0.0)
            builder.add_row(f"most[{job.name}]", np.append(columns, most), np.append(worth, -1.0), upper=0.0)
        if goal == "max-min":
            objective = [0.0] * len(objective) + [1.0, 0.0, 0.0]
        else:
            objective += [float(len(jobs)), -float(len(jobs)), float(len(jobs))]
    return builder.build().with_objective(np.array(objective), maximise=True)


def _steps(row: Floats, job: Job) -> np.ndarray:
    """Return the numbers of replicas worth having: the least one, and each at which the utility rises."""
    rises = np.flatnonzero(np.diff(row) > _SAME) + 1
    return np.concatenate([[job.least], rises[rises > job.least]]).astype(np.int64)


def _sum(jobs: Sequence[Job], table: Floats, quota: int, change_cost: float) -> Allocation:
    options = []
    for row, job in zip(table, jobs, strict=True):
        steps = _steps(row, job)
        if change_cost > 0 and job.current >= job.least:
            steps = np.unique(np.append(steps, job.current))
        worth = job.weight * row[steps] - change_cost * (steps != job.current)
        options.append((steps, worth))
    found = _knapsack(options, quota)
    assert found is not None
    replicas, value = found
    return _allocation(table, replicas, value)


def _allocation(table: Floats, replicas: tuple[int, ...], value: float) -> Allocation:
    utilities = tuple(float(row[count]) for row, count in zip(table, replicas, strict=True))
    return Allocation(replicas=replicas, utilities=utilities, value=value)


def _knapsack(options: Sequence[tuple[np.ndarray, Floats]], quota: int) -> tuple[tuple[int, ...], float] | None:
    """Choose one (replicas, worth) per job within the quota, for the most worth; None when nothing fits.

    The state is the number of replicas spent, exactly; of equal worths the fewest replicas win.
    """
    best = np.full(quota + 1, _NEVER)
    best[0] = 0.0
    choices = np.zeros((len(options), quota + 1), dtype=np.int64)
    for choice, (steps, worth) in zip(choices, options, strict=True):
        after = np.full(quota + 1, _NEVER)
        for index, (step, value) in enumerate(zip(steps, worth, strict=True)):
            if step > quota:
                break
            reached = best[: quota + 1 - step] + value
            better = reached > after[step:]
            after[step:][better] = reached[better]
            choice[step:][better] = index
        best = after
    # Within rounding of the best, the fewest replicas.
    top = float(best.max())
    if top < _NEVER / 2:
        return None
    spent = int(np.flatnonzero(best >= top - 1e-12 * max(1.0, abs(top)))[0])
    left, replicas = spent, []
    for choice, (steps, _) in zip(choices[::-1], reversed(options), strict=True):
        step = int(steps[choice[left]])
        replicas.append(step)
        left -= step
    return tuple(reversed(replicas)), float(best[spent])


def _max_min(jobs: Sequence[Job], table: Floats, quota: int) -> float:
    """Return the highest utility that every job can reach at once: the needed replicas grow with it, so bisect."""
    levels = np.unique(table)
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if _needed(jobs, table, float(levels[middle])) <= quota:
            low = middle
        else:
            high = middle - 1
    # Everybody's least replicas may give more than the level found.
    return float(levels[low])


def _needed(jobs: Sequence[Job], table: Floats, level: float) -> float:
    total = 0.0
    for row, job in zip(table, jobs, strict=True):
        enough = np.flatnonzero(row[job.least :] >= level)
        if not len(enough):
            return float("inf")
        total += job.least + float(enough[0])
    return total


def _restricted(jobs: Sequence[Job], table: Floats, quota: int, low: float, high: float) -> tuple[int, ...] | None:
    """Return the replicas with the greatest sum of utilities, all of them within [low, high]; None when none are."""
    options = []
    for row, job in zip(table, jobs, strict=True):
        steps = _steps(row, job)
        inside = steps[(row[steps] >= low) & (row[steps] <= high)]
        if not len(inside):
            return None
        options.append((inside, row[inside]))
    found = _knapsack(options, quota)
    return None if found is None else found[0]


def _fair_sum(jobs: Sequence[Job], table: Floats, quota: int, least_value: float) -> Allocation:
    """Branch and bound over ranges of the least and of the greatest utility; one knapsack per pair that is left.

    With all utilities within [low, high] the value is their sum + n (low - high + 1) at most. Over a box of pairs the
    sum is bounded by Lagrangean relaxation of the quota at the loosest pair, the rest by the best corner.
    """
    curves = _Curves.of(jobs, table, quota)
    levels = np.unique(curves.utility[curves.real])
    lows, highs = levels[levels <= least_value], levels
    best: tuple[int, ...] | None = None
    value = -np.inf
    boxes = [(-np.inf, 0, len(lows) - 1, 0, len(highs) - 1)]
    knapsacks = _HEURISTIC_KNAPSACKS
    while boxes:
        negative, low, low_end, high, high_end = heapq.heappop(boxes)
        if -negative <= value + _SAME:
            break
        single = low == low_end and high == high_end
        if single or knapsacks > 0:
            knapsacks -= 1
            found = _restricted(jobs, table, quota, float(lows[low]), float(highs[high_end]))
            if found is not None:
                reached = fair_sum(np.array([row[count] for row, count in zip(table, found, strict=True)]))
                if reached > value + _SAME:
                    best, value = found, reached
        if single:
            continue
        for box in _halves(low, low_end, high, high_end):
            bound = curves.bound(float(lows[box[0]]), float(highs[box[3]]))
            bound += len(jobs) * float(lows[box[1]] - highs[box[2]] + 1.0)
            if bound > value + _SAME and lows[box[0]] <= highs[box[3]]:
                heapq.heappush(boxes, (-bound, *box))
    assert best is not None, "the least replicas fit, so some pair does"
    return _allocation(table, best, value)


def _halves(low: int, low_end: int, high: int, high_end: int) -> tuple[tuple[int, int, int, int], ...]:
    """Cut a box of pairs across its longer side."""
    if low_end - low >= high_end - high:
        middle = (low + low_end) // 2
        return (low, middle, high, high_end), (middle + 1, low_end, high, high_end)
    middle = (high + high_end) // 2
    return (low, low_end, high, middle), (low, low_end, middle + 1, high_end)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Curves:
    """The steps of all jobs as arrays, shape (job, step), padded where ``real`` is false.

    ``reduced`` holds utility - price * replicas, shape (price, job, step), for ``price``, shape (price,).
    """

    utility: Floats
    real: np.ndarray
    price: Floats
    reduced: Floats
    quota: int

    @classmethod
    def of(cls, jobs: Sequence[Job], table: Floats, quota: int) -> _Curves:
        steps = [_steps(row, job) for row, job in zip(table, jobs, strict=True)]
        shape = (len(jobs), max(len(each) for each in steps))
        utility, replicas, real = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=bool)
        for row, each in enumerate(steps):
            utility[row, : len(each)] = table[row, each]
            replicas[row, : len(each)] = each
            real[row, : len(each)] = True
        price = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, _PRICES)])
        return cls(
            utility=utility,
            real=real,
            price=price,
            reduced=utility[None] - price[:, None, None] * replicas[None],
            quota=quota,
        )

    def bound(self, low: float, high: float) -> float:
        """Return a bound on the sum of utilities when all lie within [low, high]; minus infinity when one cannot."""
        inside = self.real & (self.utility >= low) & (self.utility <= high)
        if not inside.any(axis=1).all():
            return -np.inf
        best = np.where(inside[None], self.reduced, -np.inf).max(axis=2).sum(axis=1)
        return float((best + self.price * self.quota).min())
