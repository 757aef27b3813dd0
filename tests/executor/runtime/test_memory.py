from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from executor.runtime.memory import peak_growth_bytes

CPU = torch.device("cpu")
MIB = 2**20

FAULTS = """
import resource, sys
import torch
from executor.runtime.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("no mallopt")
torch.ones(16 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(16 * 2**20)  # 64 MiB, 16384 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=False)
    if "no mallopt" in done.stderr:
        pytest.skip("the C library here has no mallopt")
    return int(done.stdout)


def test_a_large_block_that_is_kept_is_not_mapped_again() -> None:
    assert page_faults("keep") < page_faults("drop") / 4


def test_tensors_alive_at_once_count_and_tensors_one_after_the_other_do_not() -> None:
    def together() -> torch.Tensor:
        first = torch.zeros(4 * MIB)
        return torch.cat([first, first + 1])  # 16 + 16 + 32 MiB

    def in_turn() -> None:
        for _ in range(4):
            torch.zeros(4 * MIB)

    together()  # pages of the library itself come in with its first use
    assert 64 * MIB <= peak_growth_bytes(together, CPU) < 96 * MIB
    assert 16 * MIB <= peak_growth_bytes(in_turn, CPU) < 48 * MIB  # the allocator need not find the same hole again


def test_views_and_results_in_place_are_not_counted_twice() -> None:
    def work() -> None:
        tensor = torch.zeros(4 * MIB)
        tensor.add_(1).view(2, -1).t().mul_(2)

    work()
    assert 16 * MIB <= peak_growth_bytes(work, CPU) < 32 * MIB


def test_tensors_that_were_there_before_do_not_count() -> None:
    tensor = torch.zeros(16 * MIB).add_(1)
    assert peak_growth_bytes(lambda: tensor.add_(1), CPU) < 16 * MIB
