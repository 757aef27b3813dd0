"""Small profiles for the tests of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from profiles.document import LatencyStatistics, Profile, Row, Source


def row(batch: int, mean: float, *, p99: float | None = None, pp: int = 1, tp: int = 1, **fields: Any) -> Row:
    """A row whose stages share the latency equally; p99 is 10 % above the mean unless given."""
    latency_s = fields.pop("latency_s", LatencyStatistics(mean=mean, p99=mean * 1.1 if p99 is None else p99))
    fields.setdefault("stage_latency_s", (mean / pp,) * pp)
    fields.setdefault("weight_bytes", (1000,) * pp)
    fields.setdefault("peak_bytes", (1000 + 100 * batch,) * pp)
    return Row(batch=batch, latency_s=latency_s, pp=pp, tp=tp, **fields)


def profile(*rows: Row, source: Source = "measured", model: str = "resnet-18", gpu_type: str = "cpu") -> Profile:
    return Profile(model=model, gpu_type=gpu_type, source=source, rows=rows)


def curve(means: Mapping[int, float], **fields: Any) -> Profile:
    return profile(*(row(batch, mean) for batch, mean in means.items()), **fields)


LATENCIES = st.floats(min_value=1e-6, max_value=100.0)

GRIDS = st.dictionaries(st.integers(1, 128), LATENCIES, min_size=1, max_size=7)
"""Noisy grids: any latency at any batch, so most of them fall somewhere."""
