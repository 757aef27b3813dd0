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
from profiles.group import Grid, LoadedGroup, Measurable, Point, Series, SingleDevice
from profiles.holdout import ErrorSummary, HeldOut, hold_out, summarise_errors
from profiles.interference import InterferenceModel
from profiles.latency import Estimate, LatencyModel
from profiles.library import ProfileLibrary
from profiles.merging import merge_profiles
from profiles.profiler import Progress, StopRule, load_callable, profile_callable, profile_group
from profiles.roofline import DeviceRates, ModelCost, Operation, datasheet_rates, modelled_profile

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
    "merge_profiles",
    "InterferenceModel",
    "hold_out",
    "HeldOut",
    "ErrorSummary",
    "summarise_errors",
    "DeviceRates",
    "ModelCost",
    "Operation",
    "datasheet_rates",
    "modelled_profile",
    "profile_callable",
    "profile_group",
    "load_callable",
    "Measurable",
    "LoadedGroup",
    "SingleDevice",
    "Grid",
    "Series",
    "Point",
    "Progress",
    "StopRule",
]
