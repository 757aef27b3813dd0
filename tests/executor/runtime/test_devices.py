from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from executor.runtime.devices import GpuIdentity, gpu_identity


def test_a_gpu_is_named_as_cuda_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {1: SimpleNamespace(name="NVIDIA L4", uuid="3a-0f")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", known.__getitem__)
    assert gpu_identity(1) == GpuIdentity(name="NVIDIA L4", uuid="3a-0f")


@pytest.mark.gpu
def test_a_real_gpu_has_a_name_and_a_uuid() -> None:
    found = gpu_identity(0)
    assert found.name
    assert len(found.uuid.removeprefix("GPU-")) == 36
