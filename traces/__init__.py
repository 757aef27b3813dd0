"""Request and rate traces: the tables, readers and writers, synthesis, statistics, and what became of the requests."""

from traces.azure_functions import Assignment, AzureFunctions, read_azure_functions
from traces.azure_llm import read_azure_llm
from traces.demand import observed_demand
from traces.files import TraceKind, read_rate_trace, read_request_trace, trace_kind, write_trace
from traces.reading import MAX_REJECTED_RATIO, Read
from traces.statistics import ServiceStatistics, burstiness_cv, describe, describe_rates
from traces.synthesis import Diurnal, Expansion, Gamma, Load, Poisson, Streams, expand, synthesise
from traces.table import RateTrace, RequestTrace

__all__ = [
    "RateTrace",
    "RequestTrace",
    "MAX_REJECTED_RATIO",
    "Read",
    "TraceKind",
    "read_rate_trace",
    "read_request_trace",
    "trace_kind",
    "write_trace",
    "Assignment",
    "AzureFunctions",
    "read_azure_functions",
    "read_azure_llm",
    "Diurnal",
    "Expansion",
    "Gamma",
    "Load",
    "Poisson",
    "Streams",
    "expand",
    "synthesise",
    "ServiceStatistics",
    "burstiness_cv",
    "describe",
    "describe_rates",
    "observed_demand",
]
