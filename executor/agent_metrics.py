"""What an agent tells Prometheus: Triton's names where Triton has one, ``executor_`` names for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from executor.device_memory import DeviceReading
from executor.metrics import Durations, histogram
from executor.state import AgentState, Phase
from executor.statistics import Counters

__all__ = ["agent_metrics"]

_TRITON = ("model", "version")


def agent_metrics(
    state: AgentState, counters: dict[str, list[Counters]], devices: tuple[DeviceReading, ...]
) -> Iterator[Metric]:
    """Yield the metrics of one node.

    Args:
        state: What the agent reports to controllers.
        counters: Of every replica that is or was here, by service.
        devices: What the node's devices say.
    """
    yield from _inference(counters)
    yield from _generation(counters)
    yield from _replicas(state)
    yield from _devices(devices)
    yield GaugeMetricFamily("executor_agent_generation", "Generation committed last.", state.generation)
    yield GaugeMetricFamily("executor_agent_ready", "Whether everything committed serves.", float(state.ready))
    yield GaugeMetricFamily("executor_agent_drained", "Whether the node is out of rotation.", float(state.drained))
    yield GaugeMetricFamily(
        "executor_resident_bytes", "Resident memory of the agent and its workers.", state.resident_bytes
    )


def _inference(counters: dict[str, list[Counters]]) -> Iterator[Metric]:
    rows: list[tuple[str, str, list[tuple[str, float]]]] = [
        ("nv_inference_request_success", "Requests answered.", []),
        ("nv_inference_request_failure", "Requests dropped or failed.", []),
        ("nv_inference_count", "Items answered.", []),
        ("nv_inference_exec_count", "Batches run.", []),
        ("nv_inference_request_duration_us", "From submission to the answer, requests answered.", []),
        ("nv_inference_queue_duration_us", "Of it, until the batch started.", []),
        ("nv_inference_compute_input_duration_us", "Of batches, giving the worker their inputs.", []),
        ("nv_inference_compute_infer_duration_us", "Time that batches ran.", []),
        ("nv_inference_compute_output_duration_us", "Of batches, taking out the answers.", []),
        ("executor_requests_dropped", "Requests refused because they could not be met, or given up.", []),
        ("executor_model_swaps", "Batches that waited for their model to be brought to the device.", []),
        ("executor_model_swap_seconds", "How long they did.", []),
    ]
    for service, mine in counters.items():
        values: list[float] = [
            sum(one.completed for one in mine),
            sum(one.dropped + one.failed for one in mine),
            sum(one.items for one in mine),
            sum(one.batches for one in mine),
            sum(one.request_s for one in mine) * 1e6,
            sum(one.queue_s for one in mine) * 1e6,
            sum(one.input_s for one in mine) * 1e6,
            sum(one.run_s for one in mine) * 1e6,
            sum(one.output_s for one in mine) * 1e6,
            sum(one.dropped for one in mine),
            sum(one.swaps for one in mine),
            sum(one.swap_s for one in mine),
        ]
        for row, value in zip(rows, values, strict=True):
            row[2].append((service, value))
    for name, text, found in rows:
        family = _PlainCounter(name, text, labels=_TRITON)
        for service, value in found:
            family.add_metric((service, "1"), value)
        yield family


def _generation(counters: dict[str, list[Counters]]) -> Iterator[Metric]:
    """Yield what is told of services that generate tokens only."""
    sums = {service: _sum(mine) for service, mine in counters.items()}
    generating = {service: one for service, one in sums.items() if one.output_tokens}
    for name, text, field in (
        ("executor_prompt_tokens", "Tokens of the prompts of requests answered.", "prompt_tokens"),
        ("executor_generation_tokens", "Tokens generated for requests answered.", "output_tokens"),
    ):
        family = _PlainCounter(name, text, labels=_TRITON)
        for service, one in generating.items():
            family.add_metric((service, "1"), getattr(one, field))
        yield family
    first: dict[tuple[str, ...], Durations] = {(service, "1"): one.ttft for service, one in generating.items()}
    each: dict[tuple[str, ...], Durations] = {(service, "1"): one.tpot for service, one in generating.items()}
    yield histogram("executor_time_to_first_token_seconds", "From submission to the first token.", _TRITON, first)
    yield histogram("executor_time_per_output_token_seconds", "Per token after the first, by answer.", _TRITON, each)


def _sum(counters: list[Counters]) -> Counters:
    total = Counters()
    for one in counters:
        total.add(one)
    return total


class _PlainCounter(CounterMetricFamily):
    """A counter whose samples keep Triton's names, which do not end in ``_total``; ours do."""

    def add_metric(self, labels: tuple[str, ...], value: float) -> None:  # type: ignore[override]
        """Add a sample."""
        name = self.name if self.name.startswith("nv_") else f"{self.name}_total"
        self.add_sample(name, dict(zip(self._labelnames, labels, strict=True)), value)


def _replicas(state: AgentState) -> Iterator[Metric]:
    labels = ("service", "model", "group")
    phase = GaugeMetricFamily("executor_replica_phase", "1 for the phase it is in.", labels=(*labels, "phase"))
    gauges = [
        (GaugeMetricFamily("executor_replica_queued", "Requests that wait.", labels=labels), "queued"),
        (GaugeMetricFamily("executor_replica_running", "Requests in the batch that runs.", labels=labels), "running"),
        (
            GaugeMetricFamily(
                "executor_replica_expected_wait_seconds", "Until a request that arrives now would start.", labels=labels
            ),
            "expected_wait_s",
        ),
        (GaugeMetricFamily("executor_replica_weight_bytes", "Bytes of the weights.", labels=labels), "weight_bytes"),
        (GaugeMetricFamily("executor_model_load_seconds", "How long the last load took.", labels=labels), "load_s"),
    ]
    for replica in state.replicas:
        key = (replica.key.service, replica.key.variant, replica.key.group)
        for one in Phase:
            phase.add_metric((*key, one.value), float(replica.phase is one))
        for family, name in gauges:
            family.add_metric(key, getattr(replica, name))
    yield phase
    yield from (family for family, _ in gauges)


def _devices(devices: tuple[DeviceReading, ...]) -> Iterator[Metric]:
    if not devices:
        return
    found: dict[str, list[float | None]] = defaultdict(list)
    for device in devices:
        found["nv_gpu_memory_used_bytes"].append(device.used_bytes)
        found["nv_gpu_memory_total_bytes"].append(device.total_bytes)
        found["nv_gpu_utilization"].append(device.utilisation)
        found["nv_gpu_power_usage"].append(device.power_w)
    for name, values in found.items():
        family = GaugeMetricFamily(name, "As NVML says.", labels=("gpu",))
        for index, value in enumerate(values):
            if value is not None:
                family.add_metric((str(index),), value)
        yield family
