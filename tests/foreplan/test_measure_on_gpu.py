"""Profiles on a CUDA device: run with ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

import pytest

from foreplan.device import Device
from foreplan.measure import measure
from profiles.document import Profile
from profiles.group import Grid, Series
from profiles.profiler import StopRule

pytestmark = pytest.mark.gpu


def profiled(model: str, grid: Grid, **options: bool) -> Profile:
    device = Device(gpu_type="here", device="cuda", dtype="fp16", **options)  # type: ignore[arg-type]
    stop = StopRule(point_s=0.3)
    (profile,) = measure((model,), device, grid, stop, progress=lambda progress: None)
    return profile


@pytest.mark.parametrize("graphs", [False, True])
def test_a_profile_names_the_device_its_driver_and_what_it_takes(graphs: bool) -> None:
    profile = profiled("resnet-18", Grid(batches=(1, 32)), cuda_graphs=graphs)
    assert "cuda" not in profile.meta.device_name
    assert profile.meta.options == ({"cuda_graphs": "on"} if graphs else {})
    small, large = profile.rows
    assert small.weight_bytes == large.weight_bytes == pytest.approx((2 * 11.7e6,), rel=0.05)
    assert small.weight_bytes[0] < small.peak_bytes[0] < large.peak_bytes[0]
    # The images alone, and the first convolution's output beside them.
    assert large.activation_bytes[0] > 32 * (3 * 224 * 224 + 64 * 112 * 112) * 2
    assert small.load_warm_s is not None
    assert small.power_w is None or 5 < small.power_w < 2000


def test_prefill_and_decode_hold_their_cache() -> None:
    series = (Series(phase="prefill", input_tokens=64), Series(phase="decode", input_tokens=256))
    profile = profiled("llama-tiny", Grid(batches=(1, 4), series=series))
    assert profile.kv_bytes_per_token == 4 * 2 * 2 * 32 * 2
    for row in profile.rows:
        assert row.input_tokens is not None
        assert row.activation_bytes[0] >= row.batch * row.input_tokens * profile.kv_bytes_per_token
