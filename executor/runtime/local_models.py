"""Models in local folders: a ``config.json`` and safetensors weights, read by transformers, nothing else.

Any model class of transformers is built that takes images, audio or tokens alone. What is asked of it is known for the
usual heads; of others a trial run tells the tensors that they return.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file

# The heavy part of transformers: paid at import, not in the first load.
from transformers import PreTrainedModel

from executor.runtime.protocol import TensorSpec
from plans.errors import Fault, InvalidInput

__all__ = ["load_folder", "quiet_transformers"]

_CLASS = re.compile(r"[A-Za-z][A-Za-z0-9_]*")

_ANSWERS: Mapping[str, tuple[str, ...]] = {
    "ForImageClassification": ("logits",),
    "ForSemanticSegmentation": ("logits",),
    "ForObjectDetection": ("logits", "pred_boxes"),
    "ForSequenceClassification": ("logits",),
    "ForCausalLM": ("logits",),
}
"""Names of the outputs of classes that end so."""

_OWN_CODE: Mapping[str, tuple[str, ...]] = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
"""What transformers and torch compute themselves; other names stand for code of other packages, or of a repository."""

_TROUBLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers and torch raise for configurations that they cannot follow; for some, a package is missing here."""

_LONGEST_TEXT = 128

_AUDIO_SAMPLES = 16_000
"""A second of sound, at the rate that transformers' models of waveforms take."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' advice and progress bars off the terminal while a model is built."""
    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _offline() -> Iterator[None]:
    """Let nobody ask Hugging Face for what a configuration names, such as the repository of a backbone."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@_offline()
def load_folder(
    model_dir: Path, name: str, size: int | None = None
) -> tuple[PreTrainedModel, tuple[TensorSpec, ...], tuple[str, ...]]:
    """Read the model in ``model_dir / name``: the module, its inputs per item, and the names of its outputs.

    ``config.json`` decides the architecture, through transformers' tables: no code from the folder or from a repository
    that it names runs, and nothing is downloaded. All ``*.safetensors`` of the folder together are the weights; nothing
    else there is looked at, so no index, adapter or link can lead elsewhere. ``size`` is the side of its images or the
    number of tokens; None for the model's own.

    Raises:
        InvalidInput: The configuration names no architecture known here, cannot be followed, or asks for code of others
            to compute attention or experts; the weights are missing, lie outside ``model_dir``, are damaged, or are not
            those of the architecture; or it does not take inputs of that size.
    """
    root = model_dir.resolve()
    folder = root / name
    weights = _weight_files(root, folder)
    config = _config(folder)
    kind = _class_of(config, folder)
    with _refusing("weights of the architecture in config.json", folder):
        module, report = kind.from_pretrained(
            None, config=config, state_dict=_tensors(weights), output_loading_info=True
        )
    _check_weights(report, folder)
    module.config.return_dict = True  # answers are told apart by their names
    if "logits_to_keep" in inspect.signature(module.forward).parameters:
        # As in the registry: whole requests ask for the first token of an answer.
        module.config.use_cache = False
        module.forward = functools.partial(module.forward, logits_to_keep=1)
    with _refusing("sizes of inputs that a model can have", folder / "config.json"):
        inputs = _inputs(config, module.main_input_name, folder)
    inputs = _of_size(module, inputs, size, folder)
    known = next((names for head, names in _ANSWERS.items() if kind.__name__.endswith(head)), None)
    return module, inputs, known or _tried(module, inputs, folder)


@contextmanager
def _refusing(expected: str, where: Path) -> Iterator[None]:
    try:
        yield
    except _TROUBLE as error:
        raise InvalidInput.of(expected, where=where, found=_first_line(error)) from error


def _config(folder: Path) -> Any:
    with _refusing("a configuration that transformers knows", folder / "config.json"):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    faults = [
        Fault(
            where=str(folder / "config.json"),
            field=field,
            found=repr(value),
            expected=f"one of {', '.join(own)}",
            remedy="name one of these, or remove the field",
        )
        for part in _parts(config)
        for field, own in _OWN_CODE.items()
        if (value := getattr(part, f"_{field}", None)) not in (None, *own)
    ]
    if faults:
        raise InvalidInput(dict.fromkeys(faults))  # transformers copies what the whole says into its parts
    return config


def _parts(config: Any) -> Iterator[Any]:
    """Yield ``config`` and the configurations inside it, as those of the text and the images of one model."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, transformers.PreTrainedConfig):
            yield from _parts(part)


def _weight_files(root: Path, folder: Path) -> list[Path]:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InvalidInput.of(
            "weights as *.safetensors", where=folder, found="none", remedy="convert the weights to safetensors"
        )
    faults = [
        Fault(where=str(path), found=f"a link to {path.resolve()}", expected=f"a file inside {root}")
        for path in weights
        if not path.resolve().is_relative_to(root)
    ]
    if faults:
        raise InvalidInput(faults)
    return weights


def _tensors(weights: list[Path]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    faults = []
    for path in weights:
        try:
            read = load_file(path)
        except (SafetensorError, OSError) as error:
            faults.append(Fault(where=str(path), found=_first_line(error), expected="whole safetensors weights"))
            continue
        twice = sorted(read.keys() & tensors.keys())
        if twice:
            expected = "every tensor in one file of the folder"
            faults.append(Fault(where=str(path), found=f"{_some(twice)} again", expected=expected))
        tensors.update(read)
    if faults:
        raise InvalidInput(faults)
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _class_of(config: Any, folder: Path) -> Any:
    """Return the class of transformers that the configuration names; it must be one for such configurations."""
    stated = config.architectures or ""
    if isinstance(stated, list):
        stated = stated[0]
    found = getattr(transformers, stated, None) if isinstance(stated, str) and _CLASS.fullmatch(stated) else None
    if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config):
        return found
    raise InvalidInput.of(
        f"a model class of transformers {transformers.__version__} for {type(config).__name__}",
        where=folder / "config.json",
        field="architectures",
        found=repr(stated),
    )


def _tried(module: torch.nn.Module, inputs: tuple[TensorSpec, ...], folder: Path) -> tuple[str, ...]:
    """Run two items and return the names of the outputs that have one tensor for each."""
    with _refusing(f"a model that runs on {inputs[0].name} alone", folder):
        answer = _run_zeros(module, inputs, 2)
    fields = answer.items() if isinstance(answer, Mapping) else ()
    names = tuple(name for name, value in fields if _is_answer(value))
    if not names:
        raise InvalidInput.of("a model that returns named tensors, a row for each item", where=folder, found="none")
    return names


def _is_answer(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1 and len(value) == 2


def _run_zeros(module: torch.nn.Module, inputs: tuple[TensorSpec, ...], batch: int) -> Any:
    dtype = next(module.parameters()).dtype
    given = {
        spec.name: torch.zeros((batch, *spec.shape), dtype=torch.int64 if spec.datatype == "INT64" else dtype)
        for spec in inputs
    }
    with torch.inference_mode():
        return module.eval()(**given)


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
        length = min(_LONGEST_TEXT, getattr(config, "max_position_embeddings", None) or _LONGEST_TEXT)
        return (TensorSpec("input_ids", "INT64", (length,)),)
    if main_input == "input_values":
        return (TensorSpec("input_values", "FP32", (_AUDIO_SAMPLES,)),)
    raise InvalidInput.of(
        "a model of images (pixel_values), text (input_ids) or sound (input_values)",
        where=folder / "config.json",
        found=repr(main_input),
    )


def _of_size(
    module: torch.nn.Module, inputs: tuple[TensorSpec, ...], size: int | None, folder: Path
) -> tuple[TensorSpec, ...]:
    """Return ``inputs`` at ``size``, after one item of it has gone through: some weights are made for one size."""
    if size is None or size == inputs[0].shape[-1]:
        return inputs
    shape = (size,) if len(inputs[0].shape) == 1 else (inputs[0].shape[0], size, size)
    resized = (TensorSpec(inputs[0].name, inputs[0].datatype, shape),)
    try:
        _run_zeros(module, resized, 1)
    except _TROUBLE as error:
        raise InvalidInput.of(
            "a size that the model takes", where=folder, field="input size", found=f"{size}: {_first_line(error)}"
        ) from error
    return resized
