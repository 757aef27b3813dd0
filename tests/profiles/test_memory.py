from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from profiles import memory

SIZE_BYTES = 64 * 2**20


def allocate_and_drop() -> None:
    np.ones(SIZE_BYTES, dtype=np.uint8)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not keep the peak here")
def test_memory_that_was_dropped_before_the_end_still_counts() -> None:
    assert memory.resident_growth_bytes(allocate_and_drop) > SIZE_BYTES // 2


def test_without_a_kernel_that_keeps_the_peak_what_is_left_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CLEAR", Path("/nowhere/clear_refs"))
    kept: list[np.ndarray] = []
    grown = memory.resident_growth_bytes(lambda: kept.append(np.ones(SIZE_BYTES, dtype=np.uint8)))
    assert grown > SIZE_BYTES // 2


def test_work_that_needs_nothing_needs_nothing() -> None:
    assert memory.resident_growth_bytes(lambda: None) < SIZE_BYTES // 2


def test_the_work_runs_exactly_once() -> None:
    runs: list[int] = []
    memory.resident_growth_bytes(lambda: runs.append(1))
    assert runs == [1]


def test_memory_that_earlier_work_freed_counts_again() -> None:
    blocks = [np.ones(SIZE_BYTES // 1024, dtype=np.uint8) for _ in range(1024)]  # too small to be mapped one by one
    pin = blocks.pop()  # keeps the freed ones below it from going back by themselves
    del blocks
    grown = memory.resident_growth_bytes(lambda: [np.ones(SIZE_BYTES // 1024, dtype=np.uint8) for _ in range(1024)])
    assert grown > SIZE_BYTES // 2
    assert pin.size
