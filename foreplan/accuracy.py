"""Measure how often a model is right: on a folder of labelled images, or by a function that the user names."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.runtime.protocol import LoadedModel, TensorSpec
from plans.errors import Fault, InvalidInput
from profiles.document import Accuracy

__all__ = ["LabelledImages", "accuracy_by_function", "accuracy_on_images", "load_function"]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Usual normalisation of images, where the model's folder states none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledImages:
    """A folder of images and the class of each.

    Attributes:
        folder: Where the images are.
        labels: Class by file name, counted from 0 as the model counts them.
        mean: Subtracted from each channel, scaled to [0, 1].
        std: Divided by, after that.
    """

    folder: Path
    labels: Mapping[str, int]
    mean: Sequence[float] = _IMAGENET_MEAN
    std: Sequence[float] = _IMAGENET_STD

    @classmethod
    def read(cls, folder: Path, labels: Path, model_folder: Path | None = None) -> LabelledImages:
        """Read a CSV file with the columns ``file`` and ``label``, and the model's normalisation if it states one.

        Raises:
            InvalidInput: The CSV file is wrong or names images that are missing; all faults.
        """
        try:
            with labels.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InvalidInput.of("a CSV file with the columns file and label", where=labels, found=error) from error
        found: dict[str, int] = {}
        faults = []
        for line, row in enumerate(rows, start=2):
            name, label = row.get("file") or "", row.get("label") or ""
            if not name or not label.strip().isdigit():
                expected = "a file name and a class counted from 0"
                faults.append(Fault(where=str(labels), line=line, found=f"{name!r}, {label!r}", expected=expected))
            elif not (folder / name).is_file():
                faults.append(Fault(where=str(labels), line=line, found=name, expected=f"a file in {folder}"))
            else:
                found[name] = int(label)
        if not rows:
            faults.append(Fault(where=str(labels), found="no row", expected="the columns file and label, and a row"))
        if faults:
            raise InvalidInput(faults)
        return cls(folder=folder, labels=found, **_normalisation(model_folder))


def accuracy_on_images(
    model: LoadedModel, data: LabelledImages, batch: int, progress: Callable[[int], None] = lambda done: None
) -> Accuracy:
    """Return the share of images whose highest score is that of their class.

    Raises:
        InvalidInput: The model takes no images or gives no scores, a class is beyond its last, or an image is damaged.
    """
    spec = _image_spec(model)
    scores = next((each for each in model.outputs if len(each.shape) == 1), None)
    if scores is None:
        found = ", ".join(f"{each.name} {list(each.shape)}" for each in model.outputs)
        raise InvalidInput.of("an output with one score per class", field="outputs", found=found)
    beyond = sorted(name for name, label in data.labels.items() if label >= scores.shape[0])
    if beyond:
        expected = f"classes below {scores.shape[0]}"
        raise InvalidInput.of(expected, where=data.folder, found=f"{beyond[0]}: {data.labels[beyond[0]]}")
    right = done = 0
    for names in _chunks(list(data.labels), batch):
        images = np.stack([_image(data, name, spec) for name in names])
        answers = model.run({spec.name: images})[scores.name].argmax(axis=1)
        right += int((answers == [data.labels[name] for name in names]).sum())
        done += len(names)
        progress(done)
    return Accuracy(value=right / done, dataset=data.folder.name, samples=done)


def load_function(name: str) -> Callable[[LoadedModel], tuple[int, int]]:
    """Import ``module:function``, from the working folder too. It gets the loaded model and returns (right, all).

    Raises:
        InvalidInput: There is no such module or function.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise InvalidInput.of("module:function", where="command line", field="--data", found=repr(name))
    sys.path.insert(0, str(Path.cwd()))
    try:
        loaded = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InvalidInput.of("a module and a function in it", field="--data", found=f"{name!r}: {error}") from error
    finally:
        sys.path.pop(0)
    if not callable(loaded):
        raise InvalidInput.of("a function", field="--data", found=f"{name!r}, a {type(loaded).__name__}")
    counted: Callable[[LoadedModel], tuple[int, int]] = loaded
    return counted


def accuracy_by_function(model: LoadedModel, function: Callable[[LoadedModel], tuple[int, int]], name: str) -> Accuracy:
    """Let ``function`` count.

    Raises:
        InvalidInput: What it returns is no count of right answers and of all.
    """
    counts: Any = function(model)
    if not (isinstance(counts, tuple) and len(counts) == 2 and all(isinstance(count, int) for count in counts)):
        raise InvalidInput.of("two whole numbers: right answers, and all", where=name, found=repr(counts))
    right, total = counts
    if not 0 <= right <= total or total == 0:
        raise InvalidInput.of("0 <= right <= all, and all above 0", where=name, found=f"({right}, {total})")
    return Accuracy(value=right / total, metric=name.partition(":")[2], dataset=name, samples=total)


def _image_spec(model: LoadedModel) -> TensorSpec:
    if len(model.inputs) == 1 and len(model.inputs[0].shape) == 3:
        return model.inputs[0]
    found = ", ".join(f"{each.name} {list(each.shape)}" for each in model.inputs)
    raise InvalidInput.of("a model of images", field="inputs", found=found, remedy="use --data module:function")


def _normalisation(model_folder: Path | None) -> dict[str, Any]:
    path = model_folder / "preprocessor_config.json" if model_folder else None
    if path is None or not path.is_file():
        return {}
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        found = {"mean": stated.get("image_mean", _IMAGENET_MEAN), "std": stated.get("image_std", _IMAGENET_STD)}
    except (ValueError, AttributeError) as error:
        raise InvalidInput.of("a preprocessor configuration in JSON", where=path, found=error) from error
    return {name: [float(value) for value in values] for name, values in found.items()}


def _image(data: LabelledImages, name: str, spec: TensorSpec) -> NDArray[np.float32]:
    """Return one image, scaled to the model's size and normalised, shape (channels, height, width)."""
    try:
        from PIL import Image
    except ImportError as error:
        remedy = "pip install 'foreplan[images]'"
        raise InvalidInput.of("the Pillow package to read images", found="none", remedy=remedy) from error
    channels, height, width = spec.shape
    try:
        with Image.open(data.folder / name) as image:
            picture = image.convert("RGB" if channels == 3 else "L").resize((width, height), Image.Resampling.BILINEAR)
    except OSError as error:
        raise InvalidInput.of("an image", where=data.folder / name, found=error) from error
    values = np.asarray(picture, dtype=np.float32).reshape(height, width, channels) / 255
    mean, std = (np.asarray(each[:channels], dtype=np.float32) for each in (data.mean, data.std))
    return np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1), dtype=np.float32)


def _chunks(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (names[start : start + size] for start in range(0, len(names), size))
