"""How good is a latency that nobody measured? Rooflines of the registry's models against measurements on this CPU.

The rates of the processor are measured by micro-benchmarks (a second), the operations of each model counted on tensors
without data; no model runs for its estimate. Limit: at least 80 % of the (model, batch) points within a factor of 2.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from datetime import UTC, datetime
from functools import partial

from executor.runtime.cost import count_costs, measure_rates
from executor.runtime.torch_runtime import TorchRuntime
from foreplan.device import processor_name
from profiles.profiler import StopRule, sample
from profiles.roofline import latency_s

MODELS = (
    "bert-base",
    "bert-small",
    "bert-small-16",
    "bert-tiny-16",
    "deeplab-mobilenet-v2",
    "mobilenet-v2-0.5",
    "mobilenet-v2-1.0",
    "resnet-18",
    "resnet-50",
    "segformer-b0",
    "vit-small",
    "vit-tiny",
    "yolos-small",
    "yolos-tiny",
)
BATCHES = (1, 2, 4, 8)
WITHIN, SHARE = 2.0, 0.8


def main() -> int:
    """Estimate, measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    models = parser.parse_args().models
    print(f"{processor_name()}, {os.cpu_count()} cores, {datetime.now(UTC):%Y-%m-%d}, one thread, fp32")
    start = time.perf_counter()
    rates = measure_rates("cpu")
    gigaflops = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in rates.flops_per_s.items())
    print(
        f"rates in {time.perf_counter() - start:.1f} s: {gigaflops} GFLOP/s, memory {rates.bytes_per_s / 1e9:.1f} and "
        f"cache {rates.cache_bytes_per_s / 1e9:.1f} GB/s, {rates.operation_s * 1e6:.0f} us an operation"
    )
    runtime = TorchRuntime()
    stop = StopRule(point_s=1.0, warmup_runs=1)
    ratios: dict[tuple[str, int], float] = {}
    for model in models:
        estimated = {cost.batch: latency_s(cost, rates) for cost in count_costs(model, BATCHES)}
        loaded = runtime.load(model, max(BATCHES))
        for batch in BATCHES:
            run = partial(loaded.run, loaded.example(batch))
            measured = statistics.median(sample(run, stop))
            ratios[model, batch] = estimated[batch] / measured
        shown = ", ".join(f"{batch}: {ratios[model, batch]:.2f}" for batch in BATCHES)
        print(f"  {model}: estimated / measured at batch {shown}")
    inside = sum(1 / WITHIN <= ratio <= WITHIN for ratio in ratios.values())
    (model, batch), worst = max(ratios.items(), key=lambda pair: max(pair[1], 1 / pair[1]))
    met = inside >= SHARE * len(ratios)
    print(
        f"{inside} of {len(ratios)} points ({inside / len(ratios):.0%}) within a factor of {WITHIN:g} "
        f"(limit {SHARE:.0%}: {'met' if met else 'MISSED'}); worst {worst:.2f} at {model}, batch {batch}; "
        f"median ratio {statistics.median(ratios.values()):.2f}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
