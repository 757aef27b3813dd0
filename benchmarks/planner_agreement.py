"""Do HiGHS and CBC agree? The objectives of both on 50 generated problems, and the independent checker on every plan.

Each problem (4 services, 3 servers, 3 variants each) is solved to a gap of 0 by both; the largest relative difference
of the goodput is printed. Agreement with brute force on tiny problems is part of the tests (tests/planner).
"""

from __future__ import annotations

import time

from planner_small import generate

from foreplan.planning import verify
from planner import Problem, Settings, Solved, solve

PROBLEMS = 50
AGREE = 1e-5


def goodput(problem: Problem) -> float:
    """Solve, check the plan, and return the objective."""
    result = solve(problem)
    assert isinstance(result, Solved), result
    assert result.plan.solver.status == "optimal", result.plan.solver
    faults = verify(result.plan, problem.cluster, problem.services, problem.profiles)
    assert not faults, faults
    return result.plan.solver.objective


def main() -> None:
    """Solve everything twice and print."""
    worst = 0.0
    wall_s = {"highs": 0.0, "cbc": 0.0}
    for seed in range(PROBLEMS):
        found = {}
        for backend in ("highs", "cbc"):
            settings = Settings(backend=backend, seed=seed, gap=0.0, tolerance=0.0, time_limit_s=60.0)
            load, memory_gib = (0.5, 3, 8)[seed % 3], (6, 8, 16)[seed // 3 % 3]
            problem = generate(
                seed, load=load, memory_gib=memory_gib, settings=settings, service_count=4, server_count=3
            )
            started_s = time.perf_counter()
            found[backend] = goodput(problem)
            wall_s[backend] += time.perf_counter() - started_s
        apart = abs(found["highs"] - found["cbc"]) / max(abs(found["highs"]), 1e-9)
        assert apart <= AGREE, f"problem {seed}: {found}"
        worst = max(worst, apart)
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in wall_s.items())
    print(
        f"{PROBLEMS} problems: largest relative difference {worst:.1e} (at most {AGREE:g}), every plan sound; {times}"
    )


if __name__ == "__main__":
    main()
