from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from profiles.power import nvml_energy_j


class FakeError(Exception):
    pass


def library(**changes: Any) -> SimpleNamespace:
    def refuse(*_: object) -> None:
        raise FakeError

    calls = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 5000 + handle,
    }
    calls |= dict.fromkeys(changes.get("refused", ()), refuse)
    return SimpleNamespace(NVMLError=FakeError, **calls)


def test_energy_is_read_in_joules() -> None:
    assert nvml_energy_j(3, library())() == pytest.approx(5.003)


@pytest.mark.parametrize("refused", ["nvmlInit", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetTotalEnergyConsumption"])
def test_without_driver_device_or_counter_there_is_no_figure(refused: str) -> None:
    assert nvml_energy_j(0, library(refused=[refused]))() is None


def test_a_counter_that_fails_later_gives_no_figure() -> None:
    found = library()
    read = nvml_energy_j(0, found)
    found.nvmlDeviceGetTotalEnergyConsumption = library(refused=["x"]).x
    assert read() is None
