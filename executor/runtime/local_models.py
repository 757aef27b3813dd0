"""Models in local folders: a ``config.json`` and safetensors weights, read by transformers, nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel  # the heavy part of transformers: paid at import, not in the first load

from executor.runtime.protocol import TensorSpec
from plans.errors import Fault, InvalidInput

__all__ = ["load_folder", "local_names"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

_HEADS = {
    "ForImageClassification": transformers.AutoModelForImageClassification,
    "ForSemanticSegmentation": transformers.AutoModelForSemanticSegmentation,
    "ForObjectDetection": transformers.AutoModelForObjectDetection,
    "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
}
_ANSWERS = {"ForObjectDetection": ("logits", "pred_boxes")}
_LONGEST_TEXT = 128


def local_names(model_dir: Path) -> tuple[str, ...]:
    """Return the names of the models in ``model_dir``, sorted: folders inside it that have a ``config.json``.

    A link that leads out of ``model_dir`` is no model of it.
    """
    root = model_dir.resolve()
    return tuple(
        sorted(
            path.name
            for path in root.iterdir()
            if _NAME.fullmatch(path.name)
            and (path / "config.json").is_file()
            and (path / "config.json").resolve().is_relative_to(root)
        )
    )


def load_folder(model_dir: Path, name: str) -> tuple[PreTrainedModel, tuple[TensorSpec, ...], tuple[str, ...]]:
    """Read the model in ``model_dir / name``: the module, its inputs per item, and the names of its outputs.

    ``config.json`` decides the architecture, through transformers' auto classes: no code from the folder runs, and
    weights come from ``*.safetensors`` alone.

    Raises:
        InvalidInput: The configuration names no architecture known here, the weights are missing, lie outside
            ``model_dir``, are damaged, or are not those of the architecture.
    """
    folder = model_dir.resolve() / name
    _check_files(model_dir.resolve(), folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise InvalidInput.of(
            "a configuration that transformers knows", where=folder / "config.json", found=str(error).splitlines()[0]
        ) from error
    head = _head(config, folder)
    try:
        module, report = _HEADS[head].from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        problem = str(error).splitlines()[0]
        raise InvalidInput.of("safetensors weights of this architecture", where=folder, found=problem) from error
    _check_weights(report, folder)
    return module, _inputs(config, module.main_input_name, folder), _ANSWERS.get(head, ("logits",))


def _check_files(root: Path, folder: Path) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InvalidInput.of(
            "weights as *.safetensors", where=folder, found="none", remedy="convert the weights to safetensors"
        )
    faults = [
        Fault(where=str(path), found=f"a link to {path.resolve()}", expected=f"a file inside {root}")
        for path in (folder / "config.json", *weights)
        if not path.resolve().is_relative_to(root)
    ]
    if faults:
        raise InvalidInput(faults)


def _head(config: Any, folder: Path) -> str:
    stated = (config.architectures or [""])[0]
    for head in _HEADS:
        if stated.endswith(head):
            return head
    raise InvalidInput.of(
        "an architecture that ends in " + ", ".join(_HEADS),
        where=folder / "config.json",
        field="architectures",
        found=repr(stated),
    )


def _check_weights(report: dict[str, Any], folder: Path) -> None:
    faults = [
        Fault(
            where=str(folder),
            found=f"{len(report[kind])} {what} ({_some(report[kind])})",
            expected="exactly the weights of the architecture in config.json",
        )
        for kind, what in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "unknown"),
            ("mismatched_keys", "misshapen"),
        )
        if report.get(kind)
    ]
    if faults:
        raise InvalidInput(faults)


def _some(keys: Any) -> str:
    listed = sorted(map(str, keys))
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def _inputs(config: Any, main_input: str, folder: Path) -> tuple[TensorSpec, ...]:
    if main_input == "pixel_values":
        side = getattr(config, "image_size", None) or 224
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return (TensorSpec("pixel_values", "FP32", (getattr(config, "num_channels", 3), height, width)),)
    if main_input == "input_ids":
        length = min(_LONGEST_TEXT, getattr(config, "max_position_embeddings", _LONGEST_TEXT))
        return (TensorSpec("input_ids", "INT64", (length,)),)
    raise InvalidInput.of(
        "a model of images (pixel_values) or text (input_ids)", where=folder / "config.json", found=repr(main_input)
    )
