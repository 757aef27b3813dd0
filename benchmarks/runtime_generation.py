"""What iteration-level batching brings on this CPU: llama-tiny, prompts of mixed lengths, fp32, one thread.

The same sequences are generated one after the other, in batches that start and end together, and with sequences that
join and leave between iterations. Every way must give the same tokens.
"""

from __future__ import annotations

import os
import random
import sys
import time
from datetime import UTC, datetime

from executor.runtime.generation_engine import GenerationEngine
from executor.runtime.generation_queue import Finished
from executor.runtime.torch_runtime import GeneratingModel, TorchRuntime
from foreplan.device import processor_name

SEQUENCES, BATCH, REPEAT = 32, 8, 3


def finish(engine: GenerationEngine) -> dict[int, Finished]:
    """Run until nothing is left."""
    finished: dict[int, Finished] = {}
    while not engine.is_idle:
        finished |= {one.number: one for one in engine.step().finished}
    return finished


def generate(model: GeneratingModel, wanted: list[tuple[list[int], int]], batch: int, together: int) -> list[Finished]:
    """Give ``together`` sequences at a time to an engine of ``batch``, and wait for all of them before the next."""
    engine = model.engine(kv_tokens=4096, max_batch=batch)
    finished: list[Finished] = []
    for start in range(0, len(wanted), together):
        for prompt, new in wanted[start : start + together]:
            engine.add(prompt, new)
        finished += [one for _, one in sorted(finish(engine).items())]
    return finished


def main() -> int:
    """Generate, compare, print."""
    print(f"{processor_name()}, {os.cpu_count()} cores, {datetime.now(UTC):%Y-%m-%d}, one thread")
    model = TorchRuntime(threads=1).load("llama-tiny", 1)
    assert isinstance(model, GeneratingModel)
    rng = random.Random(1)
    wanted = [
        ([rng.randrange(1024) for _ in range(rng.randrange(4, 100))], rng.randrange(4, 64)) for _ in range(SEQUENCES)
    ]
    tokens = sum(new for _, new in wanted)
    ways = {"one after the other": (1, 1), f"batches of {BATCH}": (BATCH, BATCH), "by iterations": (BATCH, SEQUENCES)}
    generate(model, wanted, BATCH, SEQUENCES)  # warm up
    best: dict[str, float] = {}
    answers = []
    for _ in range(REPEAT):
        for way, (batch, together) in ways.items():
            start_s = time.perf_counter()
            done = generate(model, wanted, batch, together)
            taken_s = time.perf_counter() - start_s
            best[way] = min(best.get(way, taken_s), taken_s)
            answers.append([one.tokens for one in done])
    assert all(answer == answers[0] for answer in answers), "the ways differ in their tokens"
    slowest_s = best["one after the other"]
    for way, taken_s in best.items():
        print(f"{way:<20} {tokens / taken_s:7.0f} tokens/s, {slowest_s / taken_s:.2f}x (best of {REPEAT})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
