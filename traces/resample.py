"""Other arrivals like the recorded ones: for confidence intervals, and for asking what burstiness would do."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from plans.errors import InvalidInput
from traces.synthesis import expand
from traces.table import RequestTrace

__all__ = ["block_bootstrap", "with_burstiness"]


def block_bootstrap(trace: RequestTrace, *, block_s: float, seed: int) -> RequestTrace:
    """Return a trace of the same length, put together from random blocks of ``trace``, drawn with replacement.

    Blocks start anywhere and run over the end to the beginning (the circular block bootstrap of Politis and Romano,
    1992), so every request is equally likely, and what happens within ``block_s`` stays together, over all services.

    Args:
        trace: The recorded arrivals.
        block_s: Length of a block, seconds; at most the trace's duration is used.
        seed: Seed of the draw.

    Raises:
        InvalidInput: The block or the trace's duration is not above 0.
    """
    duration_s = trace.duration_s
    if not (0 < block_s < math.inf and duration_s > 0):
        found = f"{block_s} over {duration_s} s"
        raise InvalidInput.of("a block of more than 0 seconds and a trace of some length", field="block_s", found=found)
    block_s = min(block_s, duration_s)
    generator = np.random.default_rng(seed)
    starts_s = generator.random(math.ceil(duration_s / block_s)) * duration_s
    # Twice the trace, so that a block that runs over the end finds the beginning there.
    twice_s = np.concatenate([trace.arrival_s, trace.arrival_s + duration_s])
    rows: list[np.ndarray] = []
    times: list[np.ndarray] = []
    for position, start_s in enumerate(starts_s):
        length_s = min(block_s, duration_s - position * block_s)
        first, last = np.searchsorted(twice_s, [start_s, start_s + length_s], side="left")
        rows.append(np.arange(first, last) % max(1, len(trace)))
        times.append(np.minimum(twice_s[first:last] - start_s + position * block_s, duration_s))
    frame = trace.frame.take(np.concatenate(rows)).assign(arrival_s=np.concatenate(times))
    return RequestTrace.sorting(frame, duration_s=duration_s)


def with_burstiness(trace: RequestTrace, cv: float, *, window_s: float, seed: int) -> RequestTrace:
    """Return the same requests, moved within their windows so that gaps have the coefficient of variation ``cv``.

    Counts per service and window stay, and so does everything but the arrival times. Requests of streams stay where
    they are: frames come at their own pace.

    Args:
        trace: The recorded arrivals.
        cv: Coefficient of variation of the gaps, above 0; windows with few requests come out less bursty.
        window_s: Length of a window, seconds.
        seed: Seed of the draw.

    Raises:
        InvalidInput: ``cv`` or the window is not above 0.
    """
    moved_s = np.array(trace.arrival_s)
    fresh = expand(trace.rates(window_s), "gamma", seed=seed, cv=cv)
    framed = trace.frame["stream"].notna().to_numpy() if "stream" in trace.frame else np.zeros(len(trace), dtype=bool)
    for code, service in enumerate(trace.services):
        mine = trace.codes == code
        if not framed[mine].any():
            moved_s[mine] = fresh.arrival_s[fresh.codes == fresh.services.index(service)]
    frame: pd.DataFrame = trace.frame.assign(arrival_s=np.minimum(moved_s, trace.duration_s))
    return RequestTrace.sorting(frame, duration_s=trace.duration_s)
