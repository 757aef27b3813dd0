from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreplan import colocation
from foreplan.colocation import Slowdowns, measure_slowdowns, middle_batch, slow_down, with_slowdowns
from foreplan.device import Device
from profiles.document import LatencyStatistics, Neighbour, Profile
from tests.profiles.documents import profile, row

CPU = Device(gpu_type="cpu")
SLICE_S = 0.003

samples = st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=30)


def test_batches_shorter_than_a_time_slice_wait_for_whole_slices() -> None:
    """Two processes on one core: of 8 batches of 0.375 ms, one waits while the other process has its slice."""
    alone = [SLICE_S / 8] * 80
    together = [SLICE_S / 8 + (SLICE_S if position % 8 == 0 else 0.0) for position in range(80)]
    assert sorted(together)[40] == sorted(alone)[40]  # the median sees nothing
    assert slow_down(together, alone) == pytest.approx(2.0)


@given(samples, samples)
def test_nothing_is_faster_together(together: list[float], alone: list[float]) -> None:
    assert slow_down(together, alone) >= 1.0


@given(samples, st.floats(1.0, 100.0))
def test_the_factor_is_a_ratio(alone: list[float], factor: float) -> None:
    assert slow_down([factor * each for each in alone], alone) == pytest.approx(factor)


def test_the_middle_batch_is_that_of_what_was_measured_on_this_group() -> None:
    known = profile(*(row(batch, 0.1) for batch in (1, 2, 4)), row(64, 0.1, tp=2), row(9, 0.2, concurrency=2))
    assert middle_batch(known, CPU) == 2
    assert middle_batch(known, Device(gpu_type="cpu", tp=2)) == 64


def found(**fields: Any) -> Slowdowns:
    latency_s = {2: (LatencyStatistics(mean=0.3), 40)}
    return Slowdowns(**{"interference": {2: 1.5}, "neighbours": (), "latency_s": latency_s, **fields})


def test_copies_become_a_row_that_holds_all_of_them() -> None:
    extended = with_slowdowns(profile(row(1, 0.1), row(2, 0.2)), found(), 2, CPU)
    together = extended.rows[-1]
    assert (together.batch, together.concurrency, together.latency_s.mean, together.samples) == (2, 2, 0.3, 40)
    assert together.weight_bytes == tuple(2 * each for each in extended.rows[0].weight_bytes)
    assert together.stage_latency_s == pytest.approx((0.3,))
    assert extended.interference == {2: 1.5}


def test_measuring_again_replaces_rows_and_leaves_a_valid_document() -> None:
    once = with_slowdowns(profile(row(1, 0.1), row(2, 0.2)), found(), 2, CPU)
    again = with_slowdowns(once, found(), 2, CPU)
    assert again == once
    assert Profile.model_validate(again.model_dump(by_alias=True)) == again


def test_copies_of_a_group_give_rows_of_that_group_and_no_factors() -> None:
    known = profile(row(2, 0.05), row(2, 0.2, pp=2)).model_copy(update={"interference": {2: 1.1}})
    extended = with_slowdowns(known, found(), 2, Device(gpu_type="cpu", pp=2))
    (together,) = [each for each in extended.rows if each.concurrency == 2]
    assert (together.pp, len(together.stage_latency_s)) == (2, 2)
    assert sum(together.stage_latency_s) == pytest.approx(0.3)
    assert extended.interference == {2: 1.1}


def test_what_was_not_measured_this_time_is_kept() -> None:
    def beside(model: str, factor: float) -> Neighbour:
        return Neighbour(model=model, batch=2, neighbour_batch=2, factor=factor)

    known = profile(row(2, 0.2)).model_copy(
        update={"interference": {2: 1.2}, "neighbours": (beside("a", 1.3), beside("b", 1.4))}
    )
    extended = with_slowdowns(
        known, found(interference={}, latency_s={}, neighbours=(beside("b", 1.9), beside("c", 2.0))), 2, CPU
    )
    assert extended.interference == {2: 1.2}
    assert {each.model: each.factor for each in extended.neighbours} == {"a": 1.3, "b": 1.9, "c": 2.0}


def fitting(most: int) -> Callable[..., Any]:
    """Return what stands for processes, of which ``most`` fit on the device."""

    @contextmanager
    def workers(batches: Mapping[str, int], copies: int, device: Device) -> Iterator[list[str]]:
        yield [model for model in batches for _ in range(copies)][:most]

    return workers


def in_turns(workers: Sequence[str], window_s: float) -> list[list[float]]:
    return [[0.1 * len(workers)] * 5 for _ in workers]


def measured(monkeypatch: pytest.MonkeyPatch, most: int) -> dict[str, Slowdowns]:
    monkeypatch.setattr(colocation, "_workers", fitting(most))
    monkeypatch.setattr(colocation, "_watch", in_turns)
    return measure_slowdowns({"a": 1, "b": 4}, CPU, (3, 2), pairs=True, progress=lambda text: None)


def test_models_that_take_turns_slow_down_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    all_of_it = measured(monkeypatch, 3)
    assert all_of_it["a"].interference == pytest.approx({2: 2.0, 3: 3.0})
    assert [(n.model, n.batch, n.neighbour_batch, n.factor) for n in all_of_it["b"].neighbours] == [("a", 4, 1, 2.0)]


def test_copies_and_pairs_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(measured(monkeypatch, 2)["a"].interference) == [2]
    alone = measured(monkeypatch, 1)["a"]
    assert (alone.interference, alone.neighbours) == ({}, ())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no processes")
def test_copies_are_pinned_to_the_cores_of_one_device() -> None:
    before = {child.pid for child in psutil.Process().children()}
    with colocation._workers({"bert-tiny-16": 1}, 2, CPU) as workers:
        children = [child for child in psutil.Process().children() if child.pid not in before]
        places = [child.cpu_affinity() for child in children]
    assert len(workers) == 2
    assert places.count([min(os.sched_getaffinity(0))]) >= 2
