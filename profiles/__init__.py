"""Profiles: documents of measured latency and memory, the model that reads between them, and the profiler."""

from profiles.document import (
    Accuracy,
    LatencyStatistics,
    Neighbour,
    Origin,
    Phase,
    Profile,
    ProfileMeta,
    Row,
    Source,
)
from profiles.latency import Estimate, LatencyModel
from profiles.library import ProfileLibrary
from profiles.profiler import Measurable, Progress, StopRule, load_callable, profile_callable

__all__ = [
    "Profile",
    "ProfileMeta",
    "Row",
    "LatencyStatistics",
    "Source",
    "Phase",
    "Neighbour",
    "Accuracy",
    "Origin",
    "LatencyModel",
    "Estimate",
    "ProfileLibrary",
    "profile_callable",
    "load_callable",
    "Measurable",
    "Progress",
    "StopRule",
]
