"""AlpaServe's two placement cases: plan from the train arrivals, score on the test arrivals.

The case is converted to Foreplan's documents in memory and planned by what `foreplan plan --trace train --time-limit T
--polish S` calls. Wall times include everything from the documents to the checked plan, after one small run that
compiles the kernels.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import UTC, datetime

import numpy as np
from alpaserve_case import CASES, FOLDER, read_case

from evaluator.single_pass import SinglePassTrace, compile_hosts, count_good
from foreplan.planning import Inputs, make_plan
from foreplan.polish import PolishSettings
from planner import Settings, Solved
from plans.plan import Plan
from plans.service import Services
from traces.demand import observed_demand
from traces.table import RequestTrace

BUDGETS = ((2.0, 7.0), (3.0, 55.0))
"""(time limit of the solver, time of the polish), seconds: within 10 s and 60 s together."""


def goodput(plan: Plan, services: Services, trace: RequestTrace) -> float:
    """Return the share of ``trace`` that is served in time under AlpaServe's rules."""
    names = [service.name for service in services.services]
    service = np.array([names.index(name) for name in trace.services])[trace.codes]
    arrivals = SinglePassTrace.whole(trace.arrival_s, service)
    return int(count_good(compile_hosts(plan, services), arrivals, routing="earliest-free").sum()) / len(trace)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seed", type=int, default=1)
    seed = arguments.parse_args().seed
    print(f"{platform.processor() or platform.machine()}, {datetime.now(UTC):%Y-%m-%d}, seed {seed}")
    warm = False
    for name in CASES:
        case = read_case(name)
        published = json.loads((FOLDER / name / "placements.json").read_text())
        target = next(each for each in published if each["policy"] == "local_search_target")["test_goodput"]
        best = max(each["test_goodput"] for each in published if each["policy"] != "local_search_target")
        inputs = Inputs(
            cluster=case.cluster,
            services=case.services,
            profiles=case.profiles,
            demand=observed_demand(case.train, window_s=60.0),
        )
        if not warm:
            make_plan(inputs, Settings(headroom_ratio=0.0, time_limit_s=1.0), PolishSettings(time_s=1.0), case.train)
            warm = True
        for (limit_s, polish_s), goal in zip(BUDGETS, (best, target), strict=True):
            settings = Settings(headroom_ratio=0.0, time_limit_s=limit_s, seed=seed)
            began_s = time.perf_counter()
            result = make_plan(inputs, settings, PolishSettings(time_s=polish_s), case.train)
            wall_s = time.perf_counter() - began_s
            assert isinstance(result, Solved)
            polish = result.plan.polish
            assert polish is not None
            assert polish.attainment >= polish.start_attainment
            reached = goodput(result.plan, case.services, case.test)
            print(
                f"{name}: {wall_s:.1f} s, goodput {reached:.4f} (to reach {goal:.4f}; predicted "
                f"{polish.attainment:.4f}, the solver's plan {polish.start_attainment:.4f}), "
                f"{polish.candidates} candidates, groups "
                + ", ".join(f"{group.tp}x{group.pp}" for group in result.plan.groups)
            )


if __name__ == "__main__":
    main()
