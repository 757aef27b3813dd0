"""A run that can be advanced, looked at and continued: the engine with its arrays, without documents or tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluator import kernel
from evaluator.scenario import Arrivals, Deadlines, Replicas
from evaluator.settings import Settings
from evaluator.state import (
    CELLS,
    CORRECTED,
    COUNTED,
    CREDITS,
    EARLIEST_FREE,
    EXPONENTIAL,
    GOOD,
    GROUP,
    LEAST_FINISH,
    MEAN,
    NOWHERE,
    PROFILE,
    REPLICA,
    ROUND_ROBIN,
    SERVICE,
    SHORTEST_QUEUE,
    STREAM,
    WEIGHTED,
    WEIGHTED_RANDOM,
    WORLD,
    World,
)

__all__ = ["Run", "simulate_counts"]

_ROUTING = {
    "weighted": WEIGHTED,
    "weighted-random": WEIGHTED_RANDOM,
    "round-robin": ROUND_ROBIN,
    "shortest-queue": SHORTEST_QUEUE,
    "least-finish": LEAST_FINISH,
    "earliest-free": EARLIEST_FREE,
    "credits": CREDITS,
    "corrected": CORRECTED,
}
_LATENCY = {"mean": MEAN, "profile": PROFILE, "exponential": EXPONENTIAL}
_FIRST_SLOTS = 4096
_AFTER_ALL = 9
"""A priority after that of every event."""


class Run:
    """One run.

    Args:
        replicas: What runs where.
        arrivals: The trace.
        deadlines: What the services allow.
        settings: How to simulate.
        keep_requests: Whether to keep what becomes of each request (15 bytes each).
        keep_latencies: Whether to keep histograms of latency (45 kB per service).
        bin_s: Width of the timeline's bins, seconds; None: no timeline.

    Raises:
        ValueError: The arrays contradict each other; compiled code would not notice.

    Attributes:
        world: The state; compiled code reads and writes it.
    """

    _DTYPE = WORLD

    def __init__(
        self,
        replicas: Replicas,
        arrivals: Arrivals,
        deadlines: Deadlines,
        settings: Settings,
        *,
        keep_requests: bool = False,
        keep_latencies: bool = False,
        bin_s: float | None = None,
    ) -> None:
        _check(replicas, arrivals, deadlines)
        self.arrivals = arrivals
        self.settings = settings
        self.world = World(self._DTYPE)
        self.world.grow(_FIRST_SLOTS)
        self._set_rules(settings)
        self._set_arrivals(arrivals)
        self._set_replicas(replicas, settings)
        self._set_services(replicas, deadlines)
        self._set_tallies(keep_requests=keep_requests, keep_latencies=keep_latencies, bin_s=bin_s)

    def advance(self, until_s: float, *, before: int = _AFTER_ALL) -> None:
        """Process every event up to ``until_s``, at that very time only those of a priority below ``before``."""
        while kernel.advance(self.world.record, float(until_s), before) == kernel.POOL_FULL:
            self.world.grow(len(self.world.array("pool")))

    def finish(self) -> None:
        """Process what is left: until ``Settings.until_s``, or until every request has ended."""
        self.advance(self.end_s)

    @property
    def end_s(self) -> float:
        """When the run is over at the latest; infinite when it goes on until everything has ended."""
        return math.inf if self.settings.until_s is None else self.settings.until_s

    def offered(self) -> slice:
        """Return which requests count as offered: those between warm-up and end of the run."""
        arrival_s = self.arrivals.arrival_s
        first = int(np.searchsorted(arrival_s, self.settings.warmup_s, side="left"))
        return slice(first, max(first, int(np.searchsorted(arrival_s, self.end_s, side="right"))))

    def _set_rules(self, settings: Settings) -> None:
        world = self.world
        for name in (
            "seed",
            "credit_target",
            "batch_delay_s",
            "overhead_s",
            "response_s",
            "iteration_overhead_s",
            "credit_increase",
            "credit_decrease",
            "warmup_s",
            "early_drop",
        ):
            world[name] = getattr(settings, name)
        world["routing"] = _ROUTING[settings.routing]
        world["latency"] = _LATENCY[settings.latency]
        world["edf"] = settings.order == "edf"
        world["admission"] = settings.admission == "arrival"
        world["margin_s"] = settings.admission_margin_s
        world["until_s"] = self.end_s

    def _set_arrivals(self, arrivals: Arrivals) -> None:
        world = self.world
        world["request_count"] = len(arrivals.arrival_s)
        world.attach("arrival_s", np.ascontiguousarray(arrivals.arrival_s))
        world.attach("code", np.ascontiguousarray(arrivals.code))
        world.attach("service_of_code", arrivals.service_of_code)
        if arrivals.stream is not None:
            world.attach("stream_of", arrivals.stream)
        if arrivals.output_tokens is not None:
            world.attach("output_tokens", arrivals.output_tokens)
        streams = np.zeros(len(arrivals.stream_names), STREAM)
        streams["replica"] = streams["gather"] = NOWHERE
        world.attach("streams", streams)

    def _set_replicas(self, replicas: Replicas, settings: Settings) -> None:
        world = self.world
        count, largest, most_stages = replicas.stage_s.shape
        group_count = len(replicas.stages)
        single = settings.admission == "arrival"
        max_batch = np.minimum(replicas.max_batch, 1) if single else replicas.max_batch
        total_s = _left_to_right_sum(replicas.stage_s)
        full = replicas.stage_s[np.arange(count), max_batch - 1] if count else np.zeros((0, most_stages))
        records = np.zeros(count, REPLICA)
        for name in ("head", "tail", "heap", "gather", "gather_last", "generates"):
            records[name] = NOWHERE
        records["group"] = replicas.group_of
        records["service"] = replicas.service_of
        records["max_batch"] = max_batch
        records["frames"] = np.minimum(replicas.frames, max_batch)
        records["largest_s"] = total_s[np.arange(count), max_batch - 1]
        records["share_s"] = full.max(axis=1, initial=0.0) / max_batch
        groups = np.zeros(group_count, GROUP)
        groups["dispatch_s"] = groups["end_s"] = groups["flush_s"] = groups["fails_s"] = np.inf
        groups["running"] = groups["running_last"] = NOWHERE
        groups["stages"] = replicas.stages
        groups["concurrency"] = np.where(replicas.stages == 1, settings.concurrency, 1)
        groups["first"] = np.searchsorted(replicas.group_of, np.arange(group_count), side="left")
        groups["last"] = np.searchsorted(replicas.group_of, np.arange(group_count), side="right")
        order = np.argsort(replicas.service_of, kind="stable").astype(np.int32)
        records["route"][order] = np.arange(count)
        lengths = {"group_count": group_count, "replica_count": count, "largest": largest, "most_stages": most_stages}
        for name, length in lengths.items():
            world[name] = length
        world["bundles"] = bool((records["frames"] > 1).any() and self.arrivals.stream is not None)
        world["most_concurrent"] = settings.concurrency
        world.attach("groups", groups)
        world.attach("replicas", records)
        world.attach("head_key", np.full(count, np.inf))
        world.attach("free_s", np.zeros((group_count, most_stages)))
        world.attach("busy_s", np.zeros((group_count, most_stages)))
        world.attach("stage_s", np.ascontiguousarray(replicas.stage_s))
        world.attach("total_s", total_s)
        quantile = np.ones((count, largest, 4)) if replicas.quantile is None else replicas.quantile
        world.attach("quantile", quantile if settings.latency == "profile" else np.zeros(0))
        world.attach("interference", _interference(replicas.interference, count, settings.concurrency))
        world.attach("route_replica", order)
        world.attach("route_weight", np.ascontiguousarray(replicas.weight[order]))
        world.attach("route_balance", np.zeros(count))
        world.attach("route_credit", np.ones(count))
        world.attach("scratch", np.zeros(count))

    def _set_services(self, replicas: Replicas, deadlines: Deadlines) -> None:
        count = len(deadlines.allowed_s)
        hosts = np.sort(replicas.service_of)
        services = np.zeros(count, SERVICE)
        services["allowed_s"] = deadlines.allowed_s
        services["allowed_per_token_s"] = deadlines.per_token_s
        services["sticky"] = deadlines.sticky
        services["first"] = np.searchsorted(hosts, np.arange(count), side="left")
        services["last"] = np.searchsorted(hosts, np.arange(count), side="right")
        self.world["service_count"] = count
        self.world.attach("services", services)
        self.world.attach("counts", np.zeros((count, COUNTED), np.int64))

    def _set_tallies(self, *, keep_requests: bool, keep_latencies: bool, bin_s: float | None) -> None:
        world = self.world
        services = int(world["service_count"])
        requests = len(self.arrivals.arrival_s)
        kept = requests if keep_requests else 0
        end_s = np.full(kept, np.nan)
        world.attach("log_end_s", end_s)
        world.attach("log_code", np.zeros(kept, np.int8))
        world.attach("log_replica", np.full(kept, NOWHERE, np.int32))
        world.attach("log_batch", np.zeros(kept, np.int16))
        world.attach("histogram", np.zeros((services if keep_latencies else 0, CELLS), np.int32))
        bins = 0
        if bin_s is not None:
            last_s = min(self.arrivals.duration_s, self.end_s)
            bins = max(1, math.ceil(last_s / bin_s - 1e-9))
            world["bin_s"] = bin_s
        world["bins"] = bins
        world.attach("timeline", np.zeros((bins, services, COUNTED), np.int64))
        world.attach("busy_timeline_s", np.zeros((bins, int(world["group_count"]))))


def simulate_counts(
    replicas: Replicas, arrivals: Arrivals, deadlines: Deadlines, settings: Settings
) -> NDArray[np.int64]:
    """Return how many requests of each service end good, shape (service,).

    The cheapest way to score a plan: arrays in, counts out. ``arrivals`` and ``deadlines`` are made once per trace;
    ``replicas`` may be made without documents.
    """
    run = Run(replicas, arrivals, deadlines, settings)
    run.finish()
    good: NDArray[np.int64] = run.world.array("counts")[:, GOOD].copy()
    return good


def _check(replicas: Replicas, arrivals: Arrivals, deadlines: Deadlines) -> None:
    """Refuse arrays that would make compiled code read or write beyond them, or never end."""
    count, largest, most_stages = replicas.stage_s.shape
    services, requests = len(deadlines.allowed_s), len(arrivals.arrival_s)
    of_replicas = (replicas.group_of, replicas.service_of, replicas.max_batch, replicas.frames, replicas.weight)
    sound = {
        "one entry per replica": all(len(each) == count for each in of_replicas),
        "replicas in the order of their groups": bool((np.diff(replicas.group_of) >= 0).all()),
        "groups that exist": _within(replicas.group_of, len(replicas.stages)),
        "services that exist": _within(replicas.service_of, services) and _within(arrivals.service_of_code, services),
        "batches from 1 to the largest": _within(replicas.max_batch - 1, largest)
        and bool((replicas.frames >= 1).all()),
        "stages from 1 to the most": _within(replicas.stages - 1, most_stages),
        "weights that are numbers": bool(np.isfinite(replicas.weight).all()),
        "latencies from 0 on": bool((np.isfinite(replicas.stage_s) & (replicas.stage_s >= 0)).all()),
        "one name per request": len(arrivals.code) == requests
        and _within(arrivals.code, len(arrivals.service_of_code)),
        "arrivals in order": requests == 0 or bool((arrivals.arrival_s[1:] >= arrivals.arrival_s[:-1]).all()),
        "fewer than 2^31 requests": requests < 2**31,
        "streams that exist": arrivals.stream is None
        or (len(arrivals.stream) == requests and _within(arrivals.stream + 1, len(arrivals.stream_names) + 1)),
        "tokens of every request": arrivals.output_tokens is None or len(arrivals.output_tokens) == requests,
    }
    if wrong := [expected for expected, fine in sound.items() if not fine]:
        raise ValueError(f"arrays with {', '.join(wrong)}")


def _within(values: NDArray[Any], limit: int) -> bool:
    """Say whether all values are from 0 to ``limit`` - 1."""
    return len(values) == 0 or (int(values.min()) >= 0 and int(values.max()) < limit)


def _left_to_right_sum(stage_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the latency of each batch: its stages added one after the other, as the document says and Python does."""
    total = np.zeros(stage_s.shape[:2])
    for stage in range(stage_s.shape[2]):
        total += stage_s[:, :, stage]
    return total


def _interference(known: NDArray[np.float64] | None, replicas: int, concurrency: int) -> NDArray[np.float64]:
    """Return factors for up to ``concurrency`` batches: those known, and perfect time sharing beyond."""
    factors = np.tile(np.arange(1.0, concurrency + 1), (replicas, 1))
    if known is not None:
        shared = min(concurrency, known.shape[1])
        factors[:, :shared] = known[:, :shared]
    return factors
