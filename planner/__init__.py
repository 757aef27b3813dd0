"""The planner: demand, profiles and inventory in; a placement with a proven optimality gap out.

No solver is imported before a problem is solved.
"""

from planner.conflict import Conflict
from planner.explain import Explanation, explain
from planner.option import Catalogue, Option, Rejection
from planner.planning import Infeasible, NoPlanFound, Report, Solved, exact_model, solve
from planner.problem import Problem
from planner.settings import Settings

__all__ = [
    "Catalogue",
    "Conflict",
    "Explanation",
    "Infeasible",
    "NoPlanFound",
    "Option",
    "Problem",
    "Rejection",
    "Report",
    "Settings",
    "Solved",
    "exact_model",
    "explain",
    "solve",
]
