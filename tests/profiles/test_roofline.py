from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.catalogue import catalogue
from plans.documents import parse_document
from plans.errors import InvalidInput
from profiles.latency import LatencyModel
from profiles.roofline import (
    ROOFLINE_ERROR_RATIO,
    DeviceRates,
    ModelCost,
    Operation,
    datasheet_rates,
    latency_s,
    modelled_profile,
)


def rates(**changes: Any) -> DeviceRates:
    fields: dict[str, Any] = {
        "gpu_type": "toy",
        "flops_per_s": {"matmul": 100.0, "convolution": 50.0, "depthwise": 10.0},
        "bytes_per_s": 10.0,
        "cache_bytes_per_s": 40.0,
        "cache_bytes": 100.0,
        "operation_s": 0.5,
        "load_bytes_per_s": 5.0,
        "source": "made up",
    }
    return DeviceRates(**(fields | changes))


def cost(*operations: Operation, batch: int = 1) -> ModelCost:
    return ModelCost(batch=batch, operations=operations, weight_bytes=50, activation_bytes=7)


def test_an_operation_takes_the_longer_of_arithmetic_and_bytes_and_its_start() -> None:
    busy = Operation(kind="matmul", flops=400.0, bytes=80.0)
    moving = Operation(kind="matmul", flops=1.0, bytes=80.0, count=3)
    beyond_cache = Operation(kind="other", flops=0.0, bytes=200.0)
    assert latency_s(cost(busy), rates()) == pytest.approx(4.5)
    assert latency_s(cost(moving), rates()) == pytest.approx(3 * 2.5)
    assert latency_s(cost(beyond_cache), rates()) == pytest.approx(20.5)
    assert latency_s(cost(busy, moving), rates()) == pytest.approx(4.5 + 7.5)


@given(st.floats(1.0, 1e6), st.floats(1.0, 1e6))
def test_a_faster_device_is_never_slower(flops: float, size: float) -> None:
    work = cost(Operation(kind="convolution", flops=flops, bytes=size))
    faster = {"matmul": 200.0, "convolution": 100.0, "depthwise": 20.0}
    assert latency_s(work, rates(flops_per_s=faster, bytes_per_s=20.0)) <= latency_s(work, rates())


def test_a_roofline_makes_a_modelled_profile_that_states_its_error() -> None:
    costs = [cost(Operation(kind="matmul", flops=100.0 * batch, bytes=1.0), batch=batch) for batch in (1, 4)]
    profile = modelled_profile("toy-model", "toy", costs, rates())
    estimate = LatencyModel(profile, 1, 1).at(4)
    assert (estimate.confidence, estimate.method) == ("modelled", "roofline")
    assert estimate.mean_s == pytest.approx(4.5)
    assert estimate.error_ratio >= ROOFLINE_ERROR_RATIO
    assert profile.rows[0].load_s == pytest.approx(10.0)
    assert profile.rows[0].peak_bytes == (57,)


def test_a_profile_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least one batch"):
        modelled_profile("toy-model", "toy", [], rates())


def test_rates_of_the_catalogue_stay_below_the_datasheet() -> None:
    for name, entry in catalogue().items():
        found = datasheet_rates(name, "fp16")
        assert found.flops_per_s["matmul"] < entry.flops_per_s["fp16"]
        assert found.bytes_per_s < entry.memory_bandwidth
        assert found.source == entry.source


def test_an_unknown_type_or_number_is_refused_with_what_there_is() -> None:
    with pytest.raises(InvalidInput, match="h100"):
        datasheet_rates("h100", "fp16")
    with pytest.raises(InvalidInput, match="fp16"):
        datasheet_rates("t4-16gb", "bf16")


def test_rates_come_back_from_a_file_and_must_cover_every_kind() -> None:
    assert parse_document(rates().model_dump_json(), DeviceRates, where="r.json") == rates()
    with pytest.raises(ValueError, match="convolution, depthwise"):
        rates(flops_per_s={"matmul": 1.0})
