"""Do one model with HiGHS, column generation, and one model with CBC agree? On 50 generated problems.

Each problem (4 services, 3 servers, 3 variants each) is solved to a gap of 0 by all three, the independent checker
looks at every plan, and the largest relative difference of the goodput is printed. The same over every feature, on 200
generated problems, is a slow test (``pytest -m slow tests/planner/test_features.py``); agreement with brute force on
tiny problems is part of every test run.
"""

from __future__ import annotations

import time
from typing import Literal

from planner_small import generate

from foreplan.planning import verify
from planner import Problem, Settings, Solved, solve

PROBLEMS = 50
AGREE = 1e-5
WAYS: dict[str, tuple[Literal["highs", "cbc"], Literal["direct", "columns"]]] = {
    "highs": ("highs", "direct"),
    "columns": ("highs", "columns"),
    "cbc": ("cbc", "direct"),
}
"""Solver and method of each way."""


def goodput(problem: Problem) -> float:
    """Solve, check the plan, and return the objective."""
    result = solve(problem)
    assert isinstance(result, Solved), result
    assert result.plan.solver.status == "optimal", result.plan.solver
    faults = verify(result.plan, problem.cluster, problem.services, problem.profiles)
    assert not faults, faults
    return result.plan.solver.objective


def main() -> None:
    """Solve everything in every way and print."""
    worst = 0.0
    wall_s = dict.fromkeys(WAYS, 0.0)
    for seed in range(PROBLEMS):
        found = {}
        for name, (backend, method) in WAYS.items():
            settings = Settings(backend=backend, method=method, seed=seed, gap=0.0, tolerance=0.0, time_limit_s=60.0)
            load, memory_gib = (0.5, 3, 8)[seed % 3], (6, 8, 16)[seed // 3 % 3]
            problem = generate(
                seed, load=load, memory_gib=memory_gib, settings=settings, service_count=4, server_count=3
            )
            started_s = time.perf_counter()
            found[name] = goodput(problem)
            wall_s[name] += time.perf_counter() - started_s
        apart = (max(found.values()) - min(found.values())) / max(abs(found["highs"]), 1e-9)
        assert apart <= AGREE, f"problem {seed}: {found}"
        worst = max(worst, apart)
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in wall_s.items())
    print(
        f"{PROBLEMS} problems: largest relative difference {worst:.1e} (at most {AGREE:g}), every plan sound; {times}"
    )


if __name__ == "__main__":
    main()
