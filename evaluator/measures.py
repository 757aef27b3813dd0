"""What a run shows, read from its tallies and its log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evaluator.run import Run
from evaluator.scenario import Arrivals
from evaluator.state import DROPPED, FAILED, GOOD, LATE, NOWHERE, REASONS
from plans.plan import Group, LoadoutEntry
from plans.service import FrequencyService, Services
from traces.outcomes import (
    OUTCOMES,
    GroupSummary,
    LatencySummary,
    RunSummary,
    ServiceSummary,
    supported_percentile,
    supported_rank,
)

__all__ = [
    "Hosts",
    "RequestLog",
    "StreamSummary",
    "Timeline",
    "accuracies",
    "cell_latency_s",
    "stream_summaries",
    "summary_of",
    "timeline_of",
]

SHORTEST_RUN_S = 1e-3
"""A run without extent (all at time 0, nothing served) counts as this long, so that rates exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """What ran: every group and every replica, in the order of their positions.

    Attributes:
        groups: The groups of all plans; one that was cut otherwise by a later plan stands twice.
        replicas: The id of its group and the loadout entry of each replica.
    """

    groups: tuple[Group, ...]
    replicas: tuple[tuple[str, LoadoutEntry], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Counts by time of arrival, in bins of ``bin_s`` from 0; what arrives or starts later is in the last.

    Attributes:
        bin_s: Width of a bin, seconds.
        services: Names, in the order of the axis.
        groups: Ids, in the order of the axis.
        outcomes: Shape (bin, service, outcome): requests by what became of them, in the order of
            `traces.outcomes.OUTCOMES`; the sum is what was offered.
        busy_ratio: Shape (bin, group): seconds that the first stage was held by batches that started in the bin, over
            the bin; it may exceed 1 where a long batch starts at the end.
    """

    bin_s: float
    services: tuple[str, ...]
    groups: tuple[str, ...]
    outcomes: NDArray[np.int64]
    busy_ratio: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSummary:
    """What became of one stream.

    Attributes:
        service: Name of its service.
        stream: Its name.
        offered: Frames.
        good: Frames finished by their deadline.
        fps: Good frames over the time from the first to the last arrival plus one mean period.
        mean_jitter_s: Mean difference between the gap of two consecutive finished frames and that of their arrivals;
            None with fewer than two finished frames.
        largest_jitter_s: The largest.
    """

    service: str
    stream: str
    offered: int
    good: int
    fps: float
    mean_jitter_s: float | None
    largest_jitter_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLog:
    """What became of each request, as arrays; `parts` gives it as tables.

    Attributes:
        arrivals: The trace; ``offered`` says which of its rows count.
        offered: Rows between warm-up and end of the run.
        names: Name of the service of each of the trace's codes.
        end_s: Shape (request,): answer at the client, drop or failure; NaN while in flight.
        code: Shape (request,): codes of `evaluator.state`.
        replica: Shape (request,): position of the replica, or -1.
        batch: Shape (request,): requests in its batch, or 0.
        groups: Group id of each replica.
        variants: Variant of each replica.
        accuracy: Accuracy of each replica.
        ttft_s: Shape (request,): time to the first token where iterations served it, else NaN; None without any.
        tpot_s: Shape (request,): time per further token, likewise.
    """

    arrivals: Arrivals
    offered: slice
    names: tuple[str, ...]
    end_s: NDArray[np.float64]
    code: NDArray[np.int8]
    replica: NDArray[np.int32]
    batch: NDArray[np.int16]
    groups: tuple[str, ...]
    variants: tuple[str, ...]
    accuracy: tuple[float, ...]
    ttft_s: NDArray[np.float64] | None = None
    tpot_s: NDArray[np.float64] | None = None

    def parts(self, rows: int = 1_000_000) -> Iterator[pd.DataFrame]:
        """Yield the log as tables of at most ``rows`` rows, in order of arrival (`Evaluation.requests`)."""
        for start in range(self.offered.start, self.offered.stop, rows):
            yield self.table(slice(start, min(start + rows, self.offered.stop)))

    def table(self, rows: slice) -> pd.DataFrame:
        """Return some rows as a table."""
        code, replica = self.code[rows], self.replica[rows]
        arrival_s = self.arrivals.arrival_s[rows]
        finished = (code == GOOD) | (code == LATE)
        outcome_of, reason_of, reasons = _labels()
        served = np.where(finished | np.isin(code, DROPPED), replica, NOWHERE)
        accuracy = np.array([*self.accuracy, np.nan])
        return pd.DataFrame(
            {
                "service": _categories(self.arrivals.code[rows], self.names),
                "scheduled_s": arrival_s,
                "latency_s": np.where(finished, self.end_s[rows] - arrival_s, np.nan),
                "outcome": _categories(outcome_of[code], OUTCOMES),
                "reason": _categories(reason_of[code], reasons),
                "group": _categories(served, self.groups),
                "variant": _categories(served, self.variants),
                "batch_size": np.where(finished & (self.batch[rows] > 0), self.batch[rows], np.nan),
                "accuracy": np.where(finished, accuracy[replica], np.nan),
                "ttft_s": np.full(len(code), np.nan) if self.ttft_s is None else self.ttft_s[rows],
                "tpot_s": np.full(len(code), np.nan) if self.tpot_s is None else self.tpot_s[rows],
            }
        )


def _categories(codes: NDArray[np.integer], names: Sequence[str]) -> pd.Categorical:
    """Return names by their numbers; equal names become one, and -1 is missing."""
    distinct = list(dict.fromkeys(names))
    place = np.array([*(distinct.index(name) for name in names), -1], dtype=np.int32)
    return pd.Categorical.from_codes(place[codes], categories=pd.Index(distinct, dtype="str"))


def _labels() -> tuple[NDArray[np.int8], NDArray[np.int8], tuple[str, ...]]:
    """Return for each code its place in `OUTCOMES`, and in the list of reasons (-1: none); and that list."""
    reasons = tuple(REASONS.values())
    outcome = np.full(max(REASONS) + 1, OUTCOMES.index("in_flight"), dtype=np.int8)
    reason = np.full(len(outcome), -1, dtype=np.int8)
    outcome[GOOD], outcome[LATE] = OUTCOMES.index("good"), OUTCOMES.index("late")
    for label, codes in (("dropped", DROPPED), ("failed", FAILED)):
        outcome[list(codes)] = OUTCOMES.index(label)
    for place, code in enumerate(REASONS):
        reason[code] = place
    return outcome, reason, reasons


def summary_of(run: Run, hosts: Hosts, services: Services, held_s: Callable[[float, float], float]) -> RunSummary:
    """Count a run that is over: exact percentiles where its log was kept, else from histograms.

    A workflow of which instances were offered counts as a service.

    Args:
        run: The run.
        hosts: What ran.
        services: Its services.
        held_s: How long GPUs were held between two times, summed over all of them.
    """
    counts = run.world.array("counts")
    offered = _offered(run, len(counts))
    end_s = max(run.arrivals.duration_s, float(run.world["last_s"])) if run.settings.until_s is None else run.end_s
    wall_s = max(end_s - run.settings.warmup_s, SHORTEST_RUN_S)
    latencies = _logged_latencies(run, len(counts)) if len(run.world.array("log_code")) else None
    replicas = run.world.array("replicas")
    accuracy = np.array(accuracies(hosts, services))
    found = []
    for position, service in enumerate((*services.services, *services.workflows)):
        if position >= len(services.services) and not offered[position]:
            continue  # workflows are shown where the trace has instances
        row = counts[position]
        own = replicas["service"] == position
        finished = int(row[GOOD] + row[LATE])
        if latencies is not None:
            percentiles = _exact(latencies[position])
        else:
            percentiles = _from_histogram(run.world.array("histogram")[position])
        ended = {
            "good": int(row[GOOD]),
            "late": int(row[LATE]),
            "dropped": int(row[list(DROPPED)].sum()),
            "failed": int(row[list(FAILED)].sum()),
        }
        inverse = float(replicas["inverse_batch"][own].sum())
        found.append(
            ServiceSummary(
                service=service.name,
                offered=int(offered[position]),
                in_flight=int(offered[position]) - sum(ended.values()),
                latency_s=percentiles,
                mean_batch=finished / inverse if inverse else None,
                accuracy=float(replicas["finished"][own] @ accuracy[own]) / finished if inverse else None,
                **ended,
            )
        )
    return RunSummary(
        wall_s=wall_s,
        gpu_hours=held_s(run.settings.warmup_s, run.settings.warmup_s + wall_s) / 3600,
        services=tuple(found),
        groups=_group_summaries(run, hosts, wall_s),
    )


def _group_summaries(run: Run, hosts: Hosts, wall_s: float) -> tuple[GroupSummary, ...]:
    """Return how busy each group was: its busiest stage; cuts of a group that plans change between count together."""
    busy_s: dict[str, list[float]] = {}
    for stages_s, group in zip(run.world.array("busy_s"), hosts.groups, strict=True):
        busy_s.setdefault(group.id, []).append(float(stages_s[: group.pp].max()))
    return tuple(
        GroupSummary(group=name, utilisation=(min(sum(cuts_s), wall_s) if len(cuts_s) > 1 else cuts_s[0]) / wall_s)
        for name, cuts_s in busy_s.items()
    )


def accuracies(hosts: Hosts, services: Services) -> list[float]:
    """Return the accuracy of each replica."""
    return [services.service(entry.service).accuracy_of(entry.variant) for _, entry in hosts.replicas]


def timeline_of(run: Run, hosts: Hosts, services: Services) -> Timeline:
    """Return the timeline of a run that was made with bins."""
    bin_s = float(run.world["bin_s"])
    found = run.world.array("timeline")
    outcome_of, _, _ = _labels()
    outcomes = np.zeros((*found.shape[:2], len(OUTCOMES)), dtype=np.int64)
    for code in range(1, len(outcome_of)):
        outcomes[:, :, outcome_of[code]] += found[:, :, code]
    rows = run.offered()
    window = np.minimum((run.arrivals.arrival_s[rows] / bin_s).astype(np.int64), len(found) - 1)
    cells = window * found.shape[1] + run.arrivals.service_of_code[run.arrivals.code[rows]]
    offered = np.bincount(cells, minlength=found.shape[0] * found.shape[1]).reshape(found.shape[:2])
    outcomes[:, :, OUTCOMES.index("in_flight")] = offered - outcomes.sum(axis=2)
    return Timeline(
        bin_s=bin_s,
        services=tuple(each.name for each in (*services.services, *services.workflows)),
        groups=tuple(group.id for group in hosts.groups),
        outcomes=outcomes,
        busy_ratio=run.world.array("busy_timeline_s") / bin_s,
    )


def stream_summaries(run: Run, services: Services) -> tuple[StreamSummary, ...]:
    """Return what became of each stream, in the order of their first frames; the run's log must be kept."""
    arrivals = run.arrivals
    if arrivals.stream is None:
        return ()
    rows = run.offered()
    stream = arrivals.stream[rows]
    order = np.argsort(stream, kind="stable")
    order = order[np.searchsorted(stream[order], 0) :]
    if not len(order):
        return ()
    code, end_s = run.world.array("log_code")[rows], run.world.array("log_end_s")[rows]
    arrival_s = arrivals.arrival_s[rows]
    numbers, starts = np.unique(stream[order], return_index=True)
    found = []
    for number, frames in zip(numbers, np.split(order, starts[1:]), strict=True):
        position, name = arrivals.stream_names[number]
        service = services.services[position]
        assert isinstance(service, FrequencyService)
        finished = frames[np.isin(code[frames], (GOOD, LATE))]
        jitter_s = np.abs(np.diff(end_s[finished]) - np.diff(arrival_s[finished]))
        span_s = float(arrival_s[frames[-1]] - arrival_s[frames[0]])
        period_s = span_s / (len(frames) - 1) if span_s > 0 else 1.0 / service.slo.fps
        good = int((code[frames] == GOOD).sum())
        found.append(
            StreamSummary(
                service=service.name,
                stream=name,
                offered=len(frames),
                good=good,
                fps=good / (span_s + period_s),
                mean_jitter_s=float(jitter_s.mean()) if len(jitter_s) else None,
                largest_jitter_s=float(jitter_s.max()) if len(jitter_s) else None,
            )
        )
    return tuple(found)


def cell_latency_s(cell: int) -> float:
    """Return the middle of a cell of the histograms (`evaluator.recording.cell_of`), seconds."""
    octave, part = divmod(cell, 256)
    return float(2.0 ** (octave - 20) * (1 + (part + 0.5) / 256))


def _offered(run: Run, services: int) -> NDArray[np.int64]:
    codes = np.bincount(run.arrivals.code[run.offered()], minlength=len(run.arrivals.service_of_code))
    offered = np.zeros(services, dtype=np.int64)
    np.add.at(offered, run.arrivals.service_of_code, codes)
    return offered


def _logged_latencies(run: Run, services: int) -> list[NDArray[np.float64]]:
    """Return the latencies of finished requests by service, unsorted."""
    rows = run.offered()
    code = run.world.array("log_code")[rows]
    finished = np.flatnonzero((code == GOOD) | (code == LATE))
    service = run.arrivals.service_of_code.astype(np.int16)[run.arrivals.code[rows][finished]]
    order = np.argsort(service, kind="stable")  # a radix sort: linear
    latency_s = (run.world.array("log_end_s")[rows] - run.arrivals.arrival_s[rows])[finished[order]]
    return np.split(latency_s, np.searchsorted(service[order], np.arange(1, services)))


def _exact(latency_s: NDArray[np.float64]) -> LatencySummary:
    ordered = np.sort(latency_s)
    return LatencySummary(**{f"p{p}": supported_percentile(ordered, p) for p in (50, 95, 99)})


def _from_histogram(cells: NDArray[np.int32]) -> LatencySummary:
    upto = np.cumsum(cells, dtype=np.int64)
    found: dict[str, float | None] = {}
    for percent in (50, 95, 99):
        rank = supported_rank(int(upto[-1]), percent)
        found[f"p{percent}"] = None if rank is None else cell_latency_s(int(np.searchsorted(upto, rank)))
    return LatencySummary(**found)
