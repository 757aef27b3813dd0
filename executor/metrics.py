"""What processes count, and how Prometheus reads it.

Counting happens on the way of every request, so it is an addition and no more; names, labels and text are made when
somebody asks (``GET /metrics``).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from datetime import datetime

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["BOUNDS_S", "Durations", "exposition", "histogram"]

BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the buckets of every histogram of durations, seconds."""


_TRITON_HEADS = re.compile(rb"^# (HELP|TYPE) (nv_\w+)_total ", re.MULTILINE)
"""Triton's counters do not end in ``_total``; the library writes so above them all the same."""


class Durations:
    """A histogram of seconds."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def merge(self, other: Durations) -> None:
        """Add what another one counted."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total_s += other.total_s

    def buckets(self) -> list[tuple[str, float]]:
        """Return the cumulative counts by upper bound, as Prometheus writes them."""
        found = []
        below = 0
        for bound, count in zip((*BOUNDS_S, None), self.counts, strict=True):
            below += count
            found.append(("+Inf" if bound is None else repr(bound), float(below)))
        return found


def histogram(name: str, text: str, labels: Sequence[str], values: dict[tuple[str, ...], Durations]) -> Metric:
    """Return histograms by label values as one family."""
    family = HistogramMetricFamily(name, text, labels=labels)
    for key, durations in values.items():
        family.add_metric(key, buckets=durations.buckets(), sum_value=durations.total_s)
    return family


class _Once(Collector):
    def __init__(self, families: Iterator[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Yield the families given."""
        yield from self._families

    def describe(self) -> list[Metric]:
        """Return nothing: names are known when they are collected."""
        return []


def exposition(families: Iterator[Metric], certificate_ends: datetime | None = None) -> bytes:
    """Return ``families``, when a certificate ends, and what the process itself uses, as Prometheus reads it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(families))
    if certificate_ends is not None:
        text = "When the certificate of this process ends, seconds since the epoch."
        name = "executor_certificate_not_after_timestamp_seconds"
        registry.register(_Once(iter([GaugeMetricFamily(name, text, value=certificate_ends.timestamp())])))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return _TRITON_HEADS.sub(rb"# \1 \2 ", generate_latest(registry))
