"""``trace import``, ``trace synth``, ``trace show`` and ``forecast``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreplan.cli.command import command
from foreplan.cli.options import Seed, read_requests, report_read
from foreplan.cli.output import Output

if TYPE_CHECKING:
    from forecaster.backtest import Backtest
    from plans.demand import Demand
    from traces.azure_functions import AzureFunctions
    from traces.rates import RateTrace
    from traces.reading import Read
    from traces.statistics import ServiceStatistics
    from traces.synthesis import Load
    from traces.table import RequestTrace

__all__ = ["register"]

_STREAM_TOLERANCE = 0.01
"""By how much the rate of streams may miss a whole number of them, for frame rates such as 29.97."""

_MOST_WINDOWS = 20_000
"""Most windows of a forecast: two weeks of minutes. Each is kept per service with all its quantiles."""


class Format(StrEnum):
    """A trace format to import; auto tells by the header."""

    auto = "auto"
    azure_functions = "azure-functions"
    azure_llm = "azure-llm"
    requests = "requests"
    rates = "rates"


class Shape(StrEnum):
    """What to write: single requests, or counts per window."""

    requests = "requests"
    rates = "rates"


class Process(StrEnum):
    """How counts become arrivals."""

    uniform = "uniform"
    poisson = "poisson"
    gamma = "gamma"
    even = "even"


class Synthesis(StrEnum):
    """A kind of load."""

    poisson = "poisson"
    gamma = "gamma"
    diurnal = "diurnal"
    streams = "streams"


OutputFile = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="Trace to write: .parquet, .csv or .csv.gz.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    group = typer.Typer(help="Import, make and inspect traces.", no_args_is_help=True)
    app.add_typer(group, name="trace")
    command(group, "import")(import_)
    command(group, "synth")(synth)
    command(group, "show")(show)
    command(app, "forecast")(forecast)


def import_(
    out: Output,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files, or a folder of days.")],
    output: OutputFile,
    source_format: Annotated[Format, typer.Option("--format", help="What the files are.")] = Format.auto,
    as_: Annotated[Shape, typer.Option("--as", help="What to write.")] = Shape.requests,
    services: Annotated[str, typer.Option(help="Services to map functions to, comma-separated.")] = "",
    top: Annotated[int | None, typer.Option(help="Keep the k busiest functions.", min=1)] = None,
    peak_rps: Annotated[float | None, typer.Option(help="Scale services down to this busiest minute.", min=0)] = None,
    start: Annotated[float, typer.Option(help="Start of the part to keep, seconds.", min=0)] = 0.0,
    duration: Annotated[float | None, typer.Option(help="Length of the part to keep, seconds.", min=0.001)] = None,
    process: Annotated[Process, typer.Option(help="How counts become arrivals.")] = Process.uniform,
    cv: Annotated[float | None, typer.Option(help="Burstiness, for --process gamma.", min=0.001)] = None,
    max_rejected: Annotated[float, typer.Option(help="Share of bad rows to put up with.", min=0, max=1)] = 0.01,
    seed: Seed = 1,
) -> None:
    """Turn somebody's trace into Foreplan's format, and account for every row left out."""
    from traces.files import write_trace

    names = [name.strip() for name in services.split(",") if name.strip()]
    read, mapping = _read_any(files, source_format, names, top, peak_rps, max_rejected, seed)
    report_read(read, out)
    trace: RequestTrace | RateTrace = read.value
    whole_s = trace.duration_s
    if start > 0 or duration is not None:
        trace = trace.window(start, start + duration if duration is not None else start + trace.duration_s)
    trace = _shaped(trace, as_, process, cv, seed)
    write_trace(output, trace)
    statistics = _statistics(trace)
    if not any(one.requests for one in statistics):
        out.warn(f"{output} has no requests; what was read lasts {whole_s:g} s")
    out.result(
        {
            "trace": str(output),
            "rows": read.rows,
            "rejected": read.rejected,
            "mapping": mapping,
            "services": [_statistics_json(one) for one in statistics],
        }
    )
    _print_statistics(out, statistics, str(output))


def _read_any(
    files: list[Path],
    source_format: Format,
    services: list[str],
    top: int | None,
    peak_rps: float | None,
    max_rejected: float,
    seed: int,
) -> tuple[Read[Any], list[dict[str, Any]]]:
    """Read the files as what they are; also returns which function became which service."""
    from plans.errors import InvalidInput
    from traces.azure_functions import read_azure_functions
    from traces.azure_llm import read_azure_llm
    from traces.files import read_rate_trace, read_request_trace, trace_kind

    kind = source_format.value
    if kind == "auto":
        kind = "azure-functions" if len(files) > 1 or files[0].is_dir() else trace_kind(files[0])
    if kind == "azure-functions":
        read = read_azure_functions(
            files, services=services or None, top=top, seed=seed, peak_rps=peak_rps, max_rejected_ratio=max_rejected
        )
        return _with_value(read, read.value.rates), _mapping_json(read.value)
    if len(files) > 1:
        raise InvalidInput.of("one file of this format", where="command line", found=f"{len(files)} files")
    if kind == "azure-llm":
        llm = read_azure_llm(files[0], service=services[0] if services else "chat", max_rejected_ratio=max_rejected)
        return llm, []
    if kind == "rates":
        return read_rate_trace(files[0], max_rejected_ratio=max_rejected), []
    return read_request_trace(files[0], max_rejected_ratio=max_rejected), []


def _with_value(read: Read[Any], value: object) -> Read[Any]:
    from dataclasses import replace

    return replace(read, value=value)


def _mapping_json(read: AzureFunctions) -> list[dict[str, Any]]:
    return [
        {"service": one.service, "function": one.function, "app": one.app, "invocations": one.invocations}
        for one in read.assignments
    ]


def _shaped(
    trace: RequestTrace | RateTrace, shape: Shape, process: Process, cv: float | None, seed: int
) -> RequestTrace | RateTrace:
    from traces.rates import RateTrace
    from traces.synthesis import expand

    if isinstance(trace, RateTrace):
        return trace if shape is Shape.rates else expand(trace, process.value, seed=seed, cv=cv)
    return trace.rates(60.0) if shape is Shape.rates else trace


def synth(
    out: Output,
    output: OutputFile,
    service: Annotated[list[str], typer.Option(metavar="NAME=RATE", help="A service and its rate (rps); repeat.")],
    duration: Annotated[float, typer.Option(help="Length, seconds.", min=0.001)] = 300.0,
    process: Annotated[Synthesis, typer.Option(help="Kind of load.")] = Synthesis.poisson,
    cv: Annotated[float, typer.Option(help="Burstiness, for gamma.", min=0)] = 4.0,
    period: Annotated[float, typer.Option(help="Period, for diurnal, seconds.", min=0.001)] = 86400.0,
    amplitude: Annotated[float, typer.Option(help="Swing of the rate, for diurnal.", min=0, max=1)] = 0.5,
    fps: Annotated[float, typer.Option(help="Frames per second, for streams (RATE / fps streams).", min=0.001)] = 30.0,
    seed: Seed = 1,
) -> None:
    """Make a trace from scratch."""
    from traces.files import write_trace
    from traces.synthesis import Diurnal, Gamma, Poisson, Streams, synthesise

    def load(rate_rps: float) -> Load:
        if process is Synthesis.gamma:
            return Gamma(rate_rps=rate_rps, cv=cv)
        if process is Synthesis.diurnal:
            return Diurnal(mean_rps=rate_rps, amplitude_ratio=amplitude, period_s=period)
        if process is Synthesis.streams:
            return Streams(streams=round(rate_rps / fps), fps=fps)
        return Poisson(rate_rps=rate_rps)

    rates = _rates(service)
    if process is Synthesis.streams:
        _check_streams(rates, fps)
    trace = synthesise({name: load(rate) for name, rate in rates}, duration_s=duration, seed=seed)
    write_trace(output, trace)
    statistics = _statistics(trace)
    out.result({"trace": str(output), "services": [_statistics_json(one) for one in statistics]})
    _print_statistics(out, statistics, str(output))


def _check_streams(rates: list[tuple[str, float]], fps: float) -> None:
    """Refuse rates that no whole number of streams has."""
    from plans.errors import Fault, InvalidInput

    expected = f"a rate that is a multiple of --fps ({fps:g})"
    faults = [
        Fault(where="command line", field="--service", found=repr(f"{name}={rate:g}"), expected=expected)
        for name, rate in rates
        if round(rate / fps) < 1 or abs(rate / fps - round(rate / fps)) > _STREAM_TOLERANCE
    ]
    if faults:
        raise InvalidInput(faults)


def _rates(services: list[str]) -> list[tuple[str, float]]:
    from plans.errors import Fault, InvalidInput

    found: list[tuple[str, float]] = []
    faults = []
    for text in services:
        name, equals, rate = text.partition("=")
        try:
            rate_rps = float(rate.removesuffix("rps"))
        except ValueError:
            rate_rps = -1.0
        if equals and name in dict(found):
            faults.append(
                Fault(where="command line", field="--service", found=repr(text), expected="each service once")
            )
        elif equals and name and 0 <= rate_rps < float("inf"):
            found.append((name, rate_rps))
        else:
            expected = "NAME=RATE with a rate of at least 0, such as detect=20"
            faults.append(Fault(where="command line", field="--service", found=repr(text), expected=expected))
    if faults:
        raise InvalidInput(faults)
    return found


def show(
    out: Output,
    file: Annotated[Path, typer.Argument(metavar="TRACE", help="A request or rate trace.")],
    window: Annotated[float, typer.Option(help="Window for peak and dispersion, seconds.", min=0.001)] = 60.0,
) -> None:
    """Print what a trace is like: requests, rates and burstiness per service."""
    trace = _read_own(file, out)
    statistics = _statistics(trace, window)
    out.result({"trace": str(file), "services": [_statistics_json(one) for one in statistics]})
    _print_statistics(out, statistics, str(file))


def _read_own(file: Path, out: Output) -> RequestTrace | RateTrace:
    from traces.files import read_rate_trace, trace_kind

    if trace_kind(file) != "rates":
        return read_requests(file, out)
    read = read_rate_trace(file)
    report_read(read, out)
    return read.value


def _statistics(trace: RequestTrace | RateTrace, window_s: float = 60.0) -> tuple[ServiceStatistics, ...]:
    from traces.rates import RateTrace
    from traces.statistics import describe, describe_rates

    return describe_rates(trace) if isinstance(trace, RateTrace) else describe(trace, window_s=window_s)


def _statistics_json(one: ServiceStatistics) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(one)


def _print_statistics(out: Output, statistics: tuple[ServiceStatistics, ...], title: str) -> None:
    out.table(
        ["service", "requests", "mean rps", "peak rps", "gap cv", "dispersion", "streams"],
        [
            [one.service, one.requests, one.mean_rps, one.peak_rps, one.gap_cv, one.dispersion, one.streams]
            for one in statistics
        ],
        title=title,
    )


def forecast(
    out: Output,
    trace: Annotated[Path, typer.Option("--trace", metavar="FILE", help="History: a rate or request trace.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where demand.json goes.")
    ] = None,
    method: Annotated[str, typer.Option(help="last-value or seasonal-naive.")] = "seasonal-naive",
    windows: Annotated[int, typer.Option(help="Windows to forecast.", min=1, max=_MOST_WINDOWS)] = 1,
    window: Annotated[float, typer.Option(help="Window of a request trace's counts, seconds.", min=0.001)] = 60.0,
    period: Annotated[int | None, typer.Option(help="Season in windows; found by itself when left out.", min=1)] = None,
    backtest: Annotated[bool, typer.Option("--backtest", help="Score the method on the past instead.")] = False,
    origins: Annotated[int, typer.Option(help="Forecasts that the back-test scores.", min=1)] = 10,
    seed: Seed = 1,
) -> None:
    """Forecast the windows that follow a history, as quantiles of the rate per service."""
    from forecaster import backtest as score
    from forecaster import forecast as predict
    from plans.documents import write_document
    from plans.errors import InvalidInput
    from traces.rates import RateTrace
    from traces.statistics import burstiness_cv

    read = _read_own(trace, out)
    history = read if isinstance(read, RateTrace) else read.rates(window)
    if backtest:
        result = score(history, method=method, windows=windows, origins=origins, period=period, seed=seed)
        _print_backtest(out, result)
        return
    if output is None:
        raise InvalidInput.of("--output FILE, or --backtest", where="command line", found="neither")
    known_cv = None if isinstance(read, RateTrace) else burstiness_cv(read)
    demand = predict(history, method=method, windows=windows, period=period, seed=seed, burstiness_cv=known_cv)
    write_document(output, demand)
    out.result({"demand": str(output)} | demand.model_dump(mode="json", by_alias=True))
    _print_demand(out, demand)
    out.say(f"{demand.method}; wrote {output}")


def _print_demand(out: Output, demand: Demand) -> None:
    levels = sorted({level for one in demand.services for rate in one.rate_rps for level in rate.quantiles}, key=float)
    out.table(
        ["service", "window", "mean", *(f"p{float(level) * 100:g}" for level in levels)],
        [
            [one.service, position + 1, rate.mean, *(rate.quantiles.get(level) for level in levels)]
            for one in demand.services
            for position, rate in enumerate(one.rate_rps)
        ],
        title=f"Forecast, requests per second, windows of {demand.window_s:g} s",
    )


def _print_backtest(out: Output, result: Backtest) -> None:
    levels = sorted(result.coverage)
    out.result(
        {
            "method": result.method,
            "origins": result.origins,
            "windows": result.windows,
            "weighted_quantile_loss": result.weighted_quantile_loss,
            "coverage": {f"{level:g}": share for level, share in result.coverage.items()},
            "services": [
                {
                    "service": one.service,
                    "weighted_quantile_loss": one.weighted_quantile_loss,
                    "coverage": {f"{level:g}": share for level, share in one.coverage.items()},
                    "mean_error_rps": one.mean_error_rps,
                }
                for one in result.services
            ],
        }
    )
    out.table(
        ["service", "weighted quantile loss", "mean error (rps)", *(f"covered p{level * 100:g}" for level in levels)],
        [
            [one.service, one.weighted_quantile_loss, one.mean_error_rps, *(one.coverage[level] for level in levels)]
            for one in result.services
        ],
        title=f"{result.method}: {result.origins} forecasts of {result.windows} windows",
    )
    out.say(f"over all services: weighted quantile loss {result.weighted_quantile_loss}")
