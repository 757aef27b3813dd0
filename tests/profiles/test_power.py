from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from profiles.power import nvml_driver, nvml_energy_j


class FakeError(Exception):
    pass


def library(**changes: Any) -> SimpleNamespace:
    def refuse(*_: object) -> None:
        raise FakeError

    calls = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": {"GPU-3a-0f": 3}.__getitem__,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 5000 + handle,
    }
    calls |= dict.fromkeys(changes.get("refused", ()), refuse)
    return SimpleNamespace(NVMLError=FakeError, **calls)


@pytest.mark.parametrize("uuid", ["3a-0f", "GPU-3a-0f"])
def test_energy_is_read_in_joules(uuid: str) -> None:
    assert nvml_energy_j(uuid, library())() == pytest.approx(5.003)


@pytest.mark.parametrize("refused", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"])
def test_without_driver_device_or_counter_there_is_no_figure(refused: str) -> None:
    assert nvml_energy_j("3a-0f", library(refused=[refused]))() is None


def test_the_driver_is_named_where_it_can_be_asked() -> None:
    assert nvml_driver(library()) == "580.1"
    assert nvml_driver(library(refused=["nvmlInit"])) == ""


def test_a_counter_that_fails_later_gives_no_figure() -> None:
    found = library()
    read = nvml_energy_j("3a-0f", found)
    found.nvmlDeviceGetTotalEnergyConsumption = library(refused=["x"]).x
    assert read() is None
