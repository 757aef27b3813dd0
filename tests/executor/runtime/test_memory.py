from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from executor.runtime.memory import peak_growth_bytes, peak_tensor_bytes

MIB = 2**20

FAULTS = """
import resource, statistics, sys
import torch
from executor.runtime.memory import keep_freed_memory

def faults_so_far():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def page_faults():
    found = []
    for _ in range(15):
        before = faults_so_far()
        torch.ones(10 * 2**20)  # 40 MiB, 10240 pages: above what the C library keeps by itself
        found.append(faults_so_far() - before)
    return statistics.median_low(found)  # the first ones are new until the allocator has found its holes

dropped = page_faults()
if not keep_freed_memory():
    sys.exit("no mallopt")
print(dropped, page_faults())
"""


def test_a_large_block_that_is_kept_is_not_mapped_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=False)
    if "no mallopt" in done.stderr:
        pytest.skip("the C library here has no mallopt")
    dropped, kept = map(int, done.stdout.split())
    assert kept < dropped / 2


def test_tensors_alive_at_once_count_and_tensors_one_after_the_other_do_not() -> None:
    def together() -> torch.Tensor:
        first = torch.zeros(MIB)
        return torch.cat([first, first + 1])  # 4 + 4 + 8 MiB

    def in_turn() -> None:
        for _ in range(4):
            torch.zeros(MIB)

    assert peak_tensor_bytes(together) == 16 * MIB
    assert peak_tensor_bytes(in_turn) == 4 * MIB


def test_views_and_results_in_place_are_not_counted_twice() -> None:
    assert peak_tensor_bytes(lambda: torch.zeros(2, MIB).add_(1).view(MIB, 2).t().mul_(2)) == 8 * MIB


def test_tensors_that_were_there_before_do_not_count() -> None:
    tensor = torch.zeros(MIB)
    assert peak_tensor_bytes(lambda: tensor.add_(1)) == 0


def test_the_peak_covers_tensors_and_what_is_taken_beside_them() -> None:
    def work() -> tuple[torch.Tensor, np.ndarray]:
        return torch.ones(8 * MIB), np.ones(32 * MIB, dtype=np.uint8)  # 32 + 32 MiB

    work()
    assert 60 * MIB <= peak_growth_bytes(work, torch.device("cpu")) < 160 * MIB


def test_the_work_runs_exactly_once() -> None:
    runs: list[int] = []
    peak_growth_bytes(lambda: runs.append(1), torch.device("cpu"))
    assert runs == [1]
