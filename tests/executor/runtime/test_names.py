from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from executor.runtime.names import check_names, local_model, local_names, model_names
from executor.runtime.registry import REGISTRY
from plans.errors import InvalidInput


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("mine", "resnet-18"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_folders_with_a_configuration_stand_beside_the_registry(models: Path) -> None:
    assert local_names(models) == ("mine", "resnet-18")
    assert model_names(models) == tuple(sorted({"mine", *REGISTRY}))
    assert model_names(None) == tuple(REGISTRY)


def test_a_local_model_is_named_at_its_own_size_or_another(models: Path) -> None:
    assert local_model("mine", models) == ("mine", None)
    assert local_model("mine-160", models) == ("mine", 160)
    assert local_model("bert-base", models) is None
    assert local_model("mine", None) is None


def test_all_names_are_checked_at_once(models: Path) -> None:
    check_names(["mine", "mine-64", "bert-base", "bert-base-64"], models)
    with pytest.raises(InvalidInput) as caught:
        check_names(["mine", "empty", "resnet18", "vit-tiny-33"], models)
    assert [fault.found for fault in caught.value.faults] == ["'empty'", "'resnet18'", "33"]
    assert caught.value.faults[1].remedy == "did you mean resnet-18 or resnet-50?"


def test_a_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="a folder of models"):
        check_names(["resnet-18"], tmp_path / "nowhere")


def test_names_are_checked_without_torch() -> None:
    code = "import sys, executor.runtime.names; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
