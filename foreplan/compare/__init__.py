"""Policies side by side on the same arrivals, and what each lost against the best placement known in hindsight."""

from foreplan.compare.page import render
from foreplan.compare.policies import POLICIES, ForeplanPolicy, policy
from foreplan.compare.regret import Regret, regret
from foreplan.compare.study import Outcome, Point, Sample, Study, compare

__all__ = [
    "POLICIES",
    "ForeplanPolicy",
    "Outcome",
    "Point",
    "Regret",
    "Sample",
    "Study",
    "compare",
    "policy",
    "regret",
    "render",
]
