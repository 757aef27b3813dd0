from __future__ import annotations

import subprocess
import sys

import pytest

from executor.runtime.registry import REGISTRY
from executor.runtime.torch_runtime import TorchRuntime

PARAMETERS = {  # in millions: the published sizes, with these heads and at these input sizes
    "bert-base": 109.5,
    "bert-large": 335.1,
    "bert-small": 28.8,
    "bert-small-16": 28.8,
    "bert-tiny-16": 4.4,
    "deeplab-mobilenet-v2": 2.5,
    "llama-1b": 1235.8,
    "llama-8b": 8030.3,
    "llama-tiny": 1.05,
    "mobilenet-v2-0.35": 1.7,
    "mobilenet-v2-0.5": 2.0,
    "mobilenet-v2-1.0": 3.5,
    "mobilenet-v2-1.4": 6.1,
    "resnet-18": 11.7,
    "resnet-50": 25.6,
    "segformer-b0": 3.7,
    "segformer-b1": 13.7,
    "segformer-b2": 27.4,
    "unet-32": 7.8,
    "vit-base": 86.6,
    "vit-small": 22.1,
    "vit-tiny": 5.7,
    "yolos-base": 91.5,
    "yolos-small": 23.6,
    "yolos-tiny": 6.5,
}


def test_names_are_sorted() -> None:
    assert list(REGISTRY) == sorted(REGISTRY) == sorted(PARAMETERS)


def test_listing_the_registry_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, executor.runtime.registry; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_an_architecture_has_the_size_that_its_name_says(name: str) -> None:
    import torch

    with torch.device("meta"):
        module = REGISTRY[name].build()
    assert sum(parameter.numel() for parameter in module.parameters()) / 1e6 == pytest.approx(
        PARAMETERS[name], rel=0.02
    )


@pytest.mark.parametrize("name", [name for name in sorted(PARAMETERS) if PARAMETERS[name] < 20])
def test_a_registered_model_runs(name: str) -> None:
    model = TorchRuntime(threads=1).load(name, 1)
    assert tuple(spec.name for spec in model.outputs) == REGISTRY[name].outputs
    assert model.inputs == REGISTRY[name].inputs
