"""The planner: demand, profiles and inventory in; a placement with a proven optimality gap out.

No solver is imported before a problem is solved.
"""

from planner.conflict import Conflict, Conflicts, Infeasibility, explain_infeasible
from planner.explain import Explanation, explain
from planner.option import Catalogue, Option, Rejection
from planner.planning import Infeasible, NoPlanFound, Report, Solved, exact_model, solve
from planner.polish_limits import PolishLimits
from planner.polished import Polished, Refused, ScoringTables, polish_plan
from planner.problem import Problem
from planner.relaxation import Relaxation
from planner.scoring import Scorer
from planner.settings import Settings

__all__ = [
    "Catalogue",
    "Conflict",
    "Conflicts",
    "Explanation",
    "Infeasibility",
    "Infeasible",
    "NoPlanFound",
    "Option",
    "PolishLimits",
    "Polished",
    "Problem",
    "Refused",
    "Rejection",
    "Relaxation",
    "Report",
    "Scorer",
    "ScoringTables",
    "Settings",
    "Solved",
    "exact_model",
    "explain",
    "explain_infeasible",
    "polish_plan",
    "solve",
]
