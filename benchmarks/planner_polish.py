"""The polish at scale: a generated problem, planned by the ILP, then polished by simulation for a stated time.

Problems are those of `planner_scale.py`. Arrivals are renewal processes at the planned rates; the figures are of some
that the search has not seen, and the plan is scored once more on a synthetic trace of its own by the event engine.
``--cpu`` takes processor time for its clock, for machines that others use.
"""

from __future__ import annotations

import argparse
import platform
import time
from datetime import UTC, datetime

from planner_scale import SIZES, generate

from evaluator import Settings as Simulation
from evaluator import evaluate
from foreplan.planning import verify
from foreplan.polish import PolishSettings, polished
from planner import Problem, Settings, Solved, solve
from plans.plan import Plan
from traces.synthesis import Gamma, synthesise

_TEST_REQUESTS = 300_000


def weighted_attainment(plan: Plan, problem: Problem) -> float:
    """Return the weighted share of a synthetic trace that ``plan`` serves in time."""
    rates = {each.service: (each.rate_rps[0].mean, each.burstiness_cv) for each in problem.demand.services}
    duration_s = _TEST_REQUESTS / sum(rate for rate, _ in rates.values())
    loads = {name: Gamma(rate_rps=rate, cv=cv) for name, (rate, cv) in rates.items()}
    trace = synthesise(loads, duration_s=duration_s, seed=12345)
    settings = Simulation(routing="least-finish", warmup_s=duration_s / 2)  # such short traces begin idle
    summary = evaluate(plan, problem.services, trace, settings=settings).summary
    weights = {service.name: service.weight for service in problem.services.services}
    offered = sum(weights[each.service] * each.offered for each in summary.services)
    return sum(weights[each.service] * each.good for each in summary.services) / offered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="200x512")
    parser.add_argument("--load", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--solve", type=float, default=30.0, help="seconds for the ILP")
    parser.add_argument("--polish", type=float, default=60.0, help="seconds for the polish")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {datetime.now(UTC):%Y-%m-%d}, {arguments}")
    size = next(size for size in SIZES if size.name == arguments.size)
    settings = Settings(time_limit_s=arguments.solve, seed=arguments.seed)
    problem = generate(size, load=arguments.load, seed=arguments.seed, settings=settings)
    solved = solve(problem)
    assert isinstance(solved, Solved)
    clock = time.process_time if arguments.cpu else time.monotonic
    polished(problem, solved.plan, PolishSettings(time_s=1e-3, traces=3), None)  # compiles
    began_s = clock()
    plan = polished(problem, solved.plan, PolishSettings(time_s=arguments.polish), None, clock=clock)
    wall_s = clock() - began_s
    record = plan.polish
    assert record is not None
    assert record.attainment >= record.start_attainment
    assert not verify(plan, problem.cluster, problem.services, problem.profiles, problem.demand)
    before, after = weighted_attainment(solved.plan, problem), weighted_attainment(plan, problem)
    print(
        f"{size.name}, load {arguments.load:g}: {record.scorer}; {record.candidates} candidates, {record.moves} moves, "
        f"in {wall_s:.1f} s ({record.candidates / wall_s:.0f} candidates/s); held out {record.start_attainment:.4f} -> "
        f"{record.attainment:.4f}; on a trace of its own {before:.4f} -> {after:.4f}"
    )


if __name__ == "__main__":
    main()
