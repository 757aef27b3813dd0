# ruff: noqa: N802 - the names are those of NVML
"""What NVML says of devices reaches us in CUDA's order, and nothing is made up."""

from __future__ import annotations

import asyncio
import sys
import threading
from types import SimpleNamespace

import pytest

from executor.device_memory import DeviceReading, DeviceWatch, device_readings

GPUS = ("GPU-aa01", "GPU-ab02", "GPU-bc03", "GPU-bd04")


class NVMLError(Exception):
    pass


class Nvml:
    """A machine with four GPUs, the first of which has a part ``MIG-5``: GPU k uses k MB, the part 50."""

    NVMLError = NVMLError

    def __init__(self):
        self.open = 0
        self.silent = set()

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return len(GPUS)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUUID(self, handle):
        return GPUS[handle]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "MIG-5":
            raise NVMLError("not found")
        return 50

    def nvmlDeviceGetMemoryInfo(self, handle):
        if "memory" in self.silent:
            raise NVMLError("lost")
        return SimpleNamespace(used=handle * 10**6, total=10**9)

    def nvmlDeviceGetUtilizationRates(self, handle):
        if handle == 50:
            raise NVMLError("not supported")
        return SimpleNamespace(gpu=25)

    def nvmlDeviceGetPowerUsage(self, handle):
        if "power" in self.silent:
            raise NVMLError("not supported")
        return 70_000


@pytest.fixture
def nvml(monkeypatch):
    made = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield made
    assert made.open == 0


def used_mb(count=4):
    return [reading.used_bytes // 10**6 for reading in device_readings("cuda", count)]


def test_without_a_choice_they_are_the_first_of_the_machine(nvml):
    assert used_mb() == [0, 1, 2, 3]
    assert used_mb(2) == [0, 1]
    assert device_readings("cuda", 1) == (
        DeviceReading(used_bytes=0, total_bytes=10**9, utilisation=0.25, power_w=70.0),
    )


def test_an_agent_of_one_device_among_several_tells_of_that(nvml):
    assert [reading.used_bytes for reading in device_readings("cuda:2", 1)] == [2 * 10**6]
    assert device_readings("cuda:9", 1) == ()


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ("2,3", [2, 3]),
        ("3, 0", [3, 0]),
        ("GPU-bd04,GPU-ab", [3, 1]),
        ("1,9,2", [1]),
        ("GPU-cc,1", []),
        ("-1", []),
        ("", []),
        ("MIG-5", [50]),
        ("2,MIG-6,3", [2]),
    ],
)
def test_where_cuda_sees_a_choice_they_are_those_in_its_order(nvml, monkeypatch, visible, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert used_mb() == found


def test_what_a_device_does_not_say_is_not_told(nvml, monkeypatch):
    nvml.silent.add("power")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5")
    (reading,) = device_readings("cuda", 1)
    assert (reading.utilisation, reading.power_w) == (None, None)
    nvml.silent.add("memory")
    assert device_readings("cuda", 1) == ()


def reading(used_bytes):
    return (DeviceReading(used_bytes=used_bytes, total_bytes=10**9, utilisation=None),)


def test_devices_are_asked_off_the_event_loop_at_most_once_a_second():
    threads, now_s = [], 0.0

    def ask():
        threads.append(threading.current_thread())
        return reading(len(threads))

    async def scenario():
        nonlocal now_s
        watch = DeviceWatch(ask, clock=lambda: now_s)
        assert await asyncio.gather(watch.readings(), watch.readings()) == [reading(1)] * 2
        now_s = 0.9
        assert await watch.readings() == reading(1)
        now_s = 1.0
        assert await watch.readings() == reading(2)

    asyncio.run(scenario())
    assert threading.main_thread() not in threads


def test_devices_that_hang_keep_nobody_waiting_and_take_one_thread():
    answering, asked = threading.Event(), []
    answering.set()

    def ask():
        asked.append(1)
        answering.wait()
        return reading(len(asked))

    async def scenario():
        watch = DeviceWatch(ask, clock=iter(range(0, 10**6, 10)).__next__)
        assert await watch.readings() == reading(1)
        answering.clear()
        assert [await watch.readings() for _ in range(3)] == [reading(1)] * 3
        assert len(asked) == 2
        answering.set()
        while await watch.readings() == reading(1):
            pass

    asyncio.run(scenario())


def test_a_cpu_is_not_asked(nvml):
    assert device_readings("cpu", 2) == ()
