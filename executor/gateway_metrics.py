"""What a gateway counts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import grpc
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from executor.metrics import Durations, histogram
from executor.routing import Router

__all__ = ["GatewayMetrics"]


class GatewayMetrics:
    """Requests of one gateway process, by service and how they ended."""

    def __init__(self) -> None:
        self._ended: Counter[tuple[str, grpc.StatusCode]] = Counter()
        self._durations: defaultdict[tuple[str, ...], Durations] = defaultdict(Durations)
        self._retries: Counter[str] = Counter()
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        """Requests that are not answered yet."""
        return self._in_flight

    def begin(self) -> None:
        """Count a request that goes to a replica, if there is one for it."""
        self._in_flight += 1

    def end(self, service: str, code: grpc.StatusCode, seconds: float) -> None:
        """Count how a request ended, ``seconds`` after it arrived."""
        self._in_flight -= 1
        self._ended[service, code] += 1
        self._durations[(service,)].add(seconds)

    def refused(self, service: str, code: grpc.StatusCode) -> None:
        """Count a request that is refused as it arrives; ``service`` is empty for one that is not in the plan."""
        self._ended[service, code] += 1

    def retried(self, service: str) -> None:
        """Count a request that goes to a second replica."""
        self._retries[service] += 1

    def collect(self, router: Router) -> Iterator[Metric]:
        """Yield everything, with the state of ``router``, for Prometheus."""
        ended = CounterMetricFamily(
            "executor_gateway_requests", "Requests that ended, by gRPC status.", labels=["service", "code"]
        )
        for (service, code), count in self._ended.items():
            ended.add_metric([service, code.name], count)
        yield ended
        yield histogram(
            "executor_gateway_request_seconds",
            "Time from the arrival of a request at the gateway to its answer.",
            ["service"],
            dict(self._durations),
        )
        retries = CounterMetricFamily(
            "executor_gateway_retries",
            "Requests sent to a second replica, the first being unavailable.",
            labels=["service"],
        )
        for service, count in self._retries.items():
            retries.add_metric([service], count)
        yield retries
        yield GaugeMetricFamily("executor_gateway_requests_in_flight", "Requests not answered yet.", self._in_flight)
        generation = router.table.generation if router.table else 0
        yield GaugeMetricFamily("executor_gateway_generation", "Generation of the routes in force.", generation)
        yield from _targets(router)


def _targets(router: Router) -> Iterator[Metric]:
    labels = ["service", "group"]
    healthy = GaugeMetricFamily("executor_gateway_target_healthy", "Whether a target takes requests.", labels=labels)
    sent = CounterMetricFamily("executor_gateway_target_sent", "Requests sent to a target.", labels=labels)
    failed = CounterMetricFamily("executor_gateway_target_failed", "Times a target was unavailable.", labels=labels)
    wait = GaugeMetricFamily(
        "executor_gateway_target_expected_wait_seconds", "Of a request sent to a target now.", labels=labels
    )
    for state in router.health():
        key = [state.service, state.group]
        healthy.add_metric(key, float(state.healthy))
        wait.add_metric(key, router.wait_s(state.group))
    for service, groups in router.counted().items():
        for group, (requests, failures) in groups.items():
            sent.add_metric([service, group], requests)
            failed.add_metric([service, group], failures)
    yield from (healthy, sent, failed, wait)
