"""What became of a replica's requests, as ``ModelStatistics`` tells it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

from executor.metrics import Durations
from executor.proto import open_inference_pb2 as pb

__all__ = ["Counters", "add_statistics", "statistics_to_proto"]


@dataclass(slots=True)
class Counters:
    """What became of a replica's requests, and the batches it ran. Times are sums, in seconds.

    Attributes:
        completed: Requests answered.
        dropped: Requests refused because they could not be met, or given up by their client.
        failed: Requests that failed otherwise.
        batches: Batches run.
        items: Items in the requests answered.
        request_s: From submission to the answer, of the requests answered.
        queue_s: Of it, until their batch started.
        run_s: That batches ran, from when the worker had their inputs.
        failed_s: From submission to the end, of the requests dropped and failed.
        last_ms: When the last batch ended, milliseconds since the epoch.
        swaps: Batches that waited for their model to be brought to the device.
        swap_s: How long they did.
        batch_sizes: How many batches there were of each size, in items.
        batch_run_s: The time they ran.
        input_s: Of batches, until their inputs were where the worker reads them.
        output_s: Of batches, until their answers were taken out.
        prompt_tokens: Of the requests answered, where tokens are generated.
        output_tokens: Likewise, tokens generated.
        ttft: From submission to the first token, of the requests answered.
        tpot: Per token after the first, of the requests answered.
    """

    completed: int = 0
    dropped: int = 0
    failed: int = 0
    batches: int = 0
    items: int = 0
    request_s: float = 0.0
    queue_s: float = 0.0
    run_s: float = 0.0
    failed_s: float = 0.0
    last_ms: int = 0
    swaps: int = 0
    swap_s: float = 0.0
    batch_sizes: Counter[int] = field(default_factory=Counter)
    batch_run_s: dict[int, float] = field(default_factory=dict)
    input_s: float = 0.0
    output_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: Durations = field(default_factory=Durations)
    tpot: Durations = field(default_factory=Durations)

    def swapped(self, swap_s: float) -> None:
        """Count a batch that waited for its model to be brought to the device."""
        self.swaps += 1
        self.swap_s += swap_s

    def ran(self, items: int, run_s: float, ended_ms: int) -> None:
        """Count a batch of ``items`` items that ended well."""
        self.batches += 1
        self.run_s += run_s
        self.last_ms = ended_ms
        self.batch_sizes[items] += 1
        self.batch_run_s[items] = self.batch_run_s.get(items, 0.0) + run_s

    def generated(self, prompt_tokens: int, output_tokens: int, ttft_s: float, tpot_s: float) -> None:
        """Count an answer of tokens."""
        self.prompt_tokens += prompt_tokens
        self.output_tokens += output_tokens
        self.ttft.add(ttft_s)
        if output_tokens > 1:
            self.tpot.add(tpot_s)

    def add(self, other: Counters) -> None:
        """Add what another one counted."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.last_ms = max(self.last_ms, other.last_ms)
        self.batch_sizes.update(other.batch_sizes)
        for size, run_s in other.batch_run_s.items():
            self.batch_run_s[size] = self.batch_run_s.get(size, 0.0) + run_s
        self.ttft.merge(other.ttft)
        self.tpot.merge(other.tpot)


_SUMS = tuple(one.name for one in fields(Counters) if one.type in ("int", "float") and one.name != "last_ms")


def statistics_to_proto(service: str, version: str, counters: Iterable[Counters]) -> pb.ModelStatistics:
    """Return the statistics of one service, over its replicas."""
    found = pb.ModelStatistics(name=service, version=version)
    sizes: Counter[int] = Counter()
    times: Counter[int] = Counter()
    for one in counters:
        found.inference_count += one.items
        found.execution_count += one.batches
        found.last_inference = max(found.last_inference, one.last_ms)
        stats = found.inference_stats
        _add(stats.success, one.completed, one.request_s)
        _add(stats.fail, one.dropped + one.failed, one.failed_s)
        _add(stats.queue, one.completed, one.queue_s)
        _add(stats.compute_input, one.batches, one.input_s)
        _add(stats.compute_infer, one.batches, one.run_s)
        _add(stats.compute_output, one.batches, one.output_s)
        sizes.update(one.batch_sizes)
        for size, run_s in one.batch_run_s.items():
            times[size] += round(run_s * 1e9)
    for size in sorted(sizes):
        batch = found.batch_stats.add(batch_size=size)
        batch.compute_infer.count = sizes[size]
        batch.compute_infer.ns = times[size]
    return found


def _add(duration: pb.StatisticDuration, count: int, seconds: float) -> None:
    duration.count += count
    duration.ns += round(seconds * 1e9)


def add_statistics(
    services: Sequence[str], answers: Iterable[pb.ModelStatisticsResponse]
) -> pb.ModelStatisticsResponse:
    """Return what several agents say of ``services``, added up service by service."""
    sums = {service: statistics_to_proto(service, "1", [Counters()]) for service in services}
    sizes: dict[tuple[str, int], pb.InferBatchStatistics] = {}
    for answer in answers:
        for one in answer.model_stats:
            total = sums.get(one.name)
            if total is None:
                continue
            total.inference_count += one.inference_count
            total.execution_count += one.execution_count
            total.last_inference = max(total.last_inference, one.last_inference)
            for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"):
                theirs = getattr(one.inference_stats, name)
                mine = getattr(total.inference_stats, name)
                mine.count += theirs.count
                mine.ns += theirs.ns
            for batch in one.batch_stats:
                known = sizes.setdefault(
                    (one.name, batch.batch_size), pb.InferBatchStatistics(batch_size=batch.batch_size)
                )
                known.compute_infer.count += batch.compute_infer.count
                known.compute_infer.ns += batch.compute_infer.ns
    for service, size in sorted(sizes):
        sums[service].batch_stats.append(sizes[service, size])
    return pb.ModelStatisticsResponse(model_stats=list(sums.values()))
