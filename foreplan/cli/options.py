"""Options that several commands share, spelled once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from foreplan.cli.output import Output
    from plans.demand import Demand
    from traces.reading import Read
    from traces.table import RequestTrace

__all__ = [
    "ClusterFile",
    "CurrentFile",
    "DemandFile",
    "EngineName",
    "Gateways",
    "PlanFile",
    "ProfilesDir",
    "Seed",
    "ServicesFile",
    "TraceFile",
    "Workers",
    "compilation_told",
    "read_demand",
    "read_requests",
    "report_read",
]

ClusterFile = Annotated[Path, typer.Option("--cluster", metavar="FILE", help="cluster.yaml: GPU types and nodes.")]
ServicesFile = Annotated[Path, typer.Option("--services", metavar="FILE", help="services.yaml: services and SLOs.")]
ProfilesDir = Annotated[Path, typer.Option("--profiles", metavar="DIR", help="Folder of profile documents.")]
DemandFile = Annotated[Path | None, typer.Option("--demand", metavar="FILE", help="demand.json from `forecast`.")]
TraceFile = Annotated[
    Path | None, typer.Option("--trace", metavar="FILE", help="Request trace to take rates and burstiness from.")
]
CurrentFile = Annotated[
    Path | None,
    typer.Option("--current", metavar="FILE", help="The running plan; the new one moves as little as it can."),
]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")]
Gateways = Annotated[
    list[str], typer.Option("--gateway", metavar="HOST:PORT", help="A gateway; repeat for each.", show_default=False)
]
EngineName = Annotated[
    Literal["processes", "ray"],
    typer.Option("--engine", help="Where many runs are done: processes here, or Ray (the ray extra)."),
]
Workers = Annotated[int, typer.Option("--workers", help="Runs at a time; 0 is one per core.", min=0)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.", min=0)]


def read_demand(demand: Path | None, trace: Path | None, window_s: float, out: Output) -> Demand:
    """Return the demand from ``--demand`` or, in its place, as observed in ``--trace``.

    Raises:
        InvalidInput: Both or neither are given, or the file is wrong.
    """
    from plans.demand import Demand
    from plans.documents import read_document
    from plans.errors import InvalidInput

    if (demand is None) == (trace is None):
        found = "neither" if demand is None else "both"
        raise InvalidInput.of("one of --demand and --trace", where="command line", found=found)
    if demand is not None:
        return read_document(demand, Demand)
    from traces.demand import observed_demand

    assert trace is not None
    return observed_demand(read_requests(trace, out), window_s=window_s)


def read_requests(path: Path, out: Output) -> RequestTrace:
    """Read a request trace and say on stderr what was left out or assumed."""
    from traces.files import read_request_trace

    read = read_request_trace(path)
    report_read(read, out)
    return read.value


@contextmanager
def compilation_told(out: Output) -> Iterator[None]:
    """Say so on stderr when the simulator has to be compiled first."""
    from evaluator.linking import on_compilation

    with on_compilation(lambda: out.note("compiling the simulator; this takes some seconds, once on a machine")):
        yield


def report_read(read: Read[Any], out: Output) -> None:
    """Say what a reader rejected and assumed."""
    for note in read.notes:
        out.warn(note)
    if read.rejected:
        out.warn(f"left out {read.rejected} of {read.rows} rows:")
        for reason, count in read.reasons.items():
            out.note(f"  {count} x {reason}")
        for fault in read.first:
            out.note(f"  e.g. {fault}")
