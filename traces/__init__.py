"""Request and rate traces: the tables, readers and writers, synthesis, statistics."""

from traces.files import read_rate_trace, read_request_trace, trace_kind, write_trace
from traces.reading import Read
from traces.synthesis import Diurnal, Gamma, Load, Poisson, Streams, expand, synthesise
from traces.table import RateTrace, RequestTrace

__all__ = [
    "RateTrace",
    "RequestTrace",
    "Read",
    "read_rate_trace",
    "read_request_trace",
    "trace_kind",
    "write_trace",
    "Diurnal",
    "Gamma",
    "Load",
    "Poisson",
    "Streams",
    "expand",
    "synthesise",
]
