from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.cores import at_low_priority, core_of_process, cores_awake, cores_of, own_cores
from plans.errors import InvalidInput


@given(threads=st.integers(1, 4), devices=st.integers(1, 6), split=st.integers(0, 6))
def test_workers_of_different_devices_share_no_core_and_leave_none_over(threads, devices, split):
    cores = tuple(range(3, 3 + devices * threads))
    one, other = tuple(range(devices))[:split], tuple(range(devices))[split:]
    found = cores_of(one, threads, cores), cores_of(other, threads, cores)
    assert [len(each) for each in found] == [len(one) * threads, len(other) * threads]
    assert sorted(found[0] + found[1]) == list(cores)


def test_too_few_cores_are_refused():
    here = len(os.sched_getaffinity(0))
    assert own_cores(1, here) == tuple(sorted(os.sched_getaffinity(0)))
    with pytest.raises(InvalidInput, match=f"{here} cores, expected at least {2 * here}"):
        own_cores(2, here)


def test_processes_get_a_core_each_from_the_last_one_on():
    here = sorted(os.sched_getaffinity(0))
    assert [core_of_process(index, len(here)) for index in range(len(here))] == here[::-1]
    with pytest.raises(InvalidInput, match=f"{len(here)} cores, expected at least {len(here) + 1}: one for each"):
        core_of_process(0, len(here) + 1)


def test_a_process_is_kept_on_its_cores_with_the_threads_that_it_had_already():
    script = """if True:
        import os, threading
        from executor.cores import pin_process
        asked, told, seen = threading.Event(), threading.Event(), []
        def look():
            asked.wait()
            seen.append(os.sched_getaffinity(0))
        thread = threading.Thread(target=look)
        thread.start()
        last = max(os.sched_getaffinity(0))
        pin_process((last,))
        asked.set()
        thread.join()
        assert seen == [{last}] and os.sched_getaffinity(0) == {last}, seen
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def niceness():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_what_is_done_at_low_priority_steps_back_and_the_caller_does_not():
    before = niceness()
    assert at_low_priority(niceness) > before
    assert niceness() == before


def test_what_fails_at_low_priority_is_told_to_the_caller():
    def fail():
        raise LookupError("on purpose")

    with pytest.raises(LookupError, match="on purpose"):
        at_low_priority(fail)


@pytest.mark.parametrize("missing", [True, False])
def test_cores_that_cannot_be_kept_awake_are_told_with_a_remedy(tmp_path, missing):
    switch = tmp_path / "cpu_dma_latency"
    if not missing:
        switch.mkdir()  # what cannot be written to, for root as well
    with pytest.raises(InvalidInput, match=r"--keep-awake: found .*expected .*cpu_dma_latency.*leave the option out"):
        cores_awake(switch).__enter__()


def test_cores_are_kept_awake_until_the_block_ends(tmp_path):
    switch = tmp_path / "cpu_dma_latency"
    switch.touch()

    def held():
        return str(switch) in {one.path for one in psutil.Process().open_files()}

    with cores_awake(switch):
        assert struct.unpack("=i", switch.read_bytes()) == (0,)
        assert held()
    assert not held()
