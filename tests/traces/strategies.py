"""Hypothesis strategies for traces, shared by the tests of every package."""

import numpy as np
import pandas as pd
from hypothesis import strategies as st

from traces.table import RateTrace, RequestTrace

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
WHOLE = st.integers(0, 2**40)
LABELS = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=5)


@st.composite
def request_traces(draw: st.DrawFn, min_size: int = 0, max_size: int = 30) -> RequestTrace:
    """Traces with any of the optional columns, equal arrival times and trailing silence among them."""
    arrivals = sorted(draw(st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=min_size, max_size=max_size)))
    services = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    size = len(arrivals)

    def column(cells: st.SearchStrategy[object]) -> list[object]:
        return draw(st.lists(cells, min_size=size, max_size=size))

    frame = pd.DataFrame(
        {
            "arrival_s": np.array(arrivals, dtype=float),
            "service": pd.Series(column(st.sampled_from(services)), dtype="str"),
        }
    )
    if draw(st.booleans()):
        frame["stream"] = pd.Series(column(st.none() | LABELS), dtype="object")
    for name in ("size_bytes", "input_tokens", "output_tokens"):
        if draw(st.booleans()):
            frame[name] = pd.Series(column(st.none() | WHOLE), dtype="object")
    silence_s = draw(st.none() | st.floats(0, 1e4))
    last_s = arrivals[-1] if arrivals else 0.0
    return RequestTrace(frame, duration_s=None if silence_s is None else last_s + silence_s)


@st.composite
def rate_traces(draw: st.DrawFn, max_count: int = 50, gaps: bool = True) -> RateTrace:
    """Traces of 1 to 3 services over 1 to 12 windows, at any start, with or without gaps."""
    window_s = draw(st.sampled_from([0.5, 1.0, 60.0, 300.0]))
    services = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    windows = draw(st.integers(1, 12))
    first = draw(st.integers(0, 5))
    size = len(services) * windows
    counts = np.array(draw(st.lists(st.integers(0, max_count), min_size=size, max_size=size)))
    starts_s = (first + np.arange(windows)) * window_s
    trace = RateTrace.from_counts(starts_s, services, counts.reshape(len(services), windows), window_s=window_s)
    if not gaps:
        return trace
    keep = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
    return RateTrace(trace.frame[np.array(keep)], window_s)
