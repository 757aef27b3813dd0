from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from executor.runtime.protocol import TensorSpec
from foreplan.accuracy import LabelledImages, accuracy_by_function, accuracy_on_images, load_function
from plans.errors import InvalidInput

Image = pytest.importorskip("PIL.Image")


class Brightest:
    """Says which of the three channels is the brightest."""

    inputs = (TensorSpec("pixel_values", "FP32", (3, 8, 8)),)
    outputs = (TensorSpec("logits", "FP32", (3,)),)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.batches.append(len(inputs["pixel_values"]))
        return {"logits": inputs["pixel_values"].mean(axis=(2, 3))}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name, color in (("red.png", (250, 0, 0)), ("green.png", (0, 250, 0)), ("blue.png", (0, 0, 250))):
        Image.new("RGB", (20, 10), color).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("file,label\nred.png,0\ngreen.png,1\nblue.png,0\n")
    return tmp_path


def test_the_share_of_right_answers_is_the_accuracy(images: Path) -> None:
    model, told = Brightest(), []
    data = LabelledImages.read(images, images / "labels.csv")
    measured = accuracy_on_images(model, data, 2, told.append)  # type: ignore[arg-type]
    assert measured.value == pytest.approx(2 / 3)
    assert (measured.metric, measured.samples) == ("top-1", 3)
    assert model.batches == [2, 1]
    assert told == [2, 3]


def test_every_wrong_line_of_the_labels_is_named(images: Path) -> None:
    (images / "labels.csv").write_text("file,label\nred.png,zero\nmissing.png,1\n,2\n")
    with pytest.raises(InvalidInput) as caught:
        LabelledImages.read(images, images / "labels.csv")
    assert [fault.line for fault in caught.value.faults] == [2, 3, 4]


@pytest.mark.parametrize("text", ["", "file,label\n"])
def test_labels_without_a_row_are_refused(images: Path, text: str) -> None:
    (images / "labels.csv").write_text(text)
    with pytest.raises(InvalidInput, match="no row"):
        LabelledImages.read(images, images / "labels.csv")


def test_a_class_beyond_the_models_last_and_a_damaged_image_are_refused(images: Path) -> None:
    (images / "labels.csv").write_text("file,label\nred.png,3\n")
    with pytest.raises(InvalidInput, match="classes below 3"):
        accuracy_on_images(Brightest(), LabelledImages.read(images, images / "labels.csv"), 1)  # type: ignore[arg-type]
    (images / "red.png").write_bytes(b"no image")
    (images / "labels.csv").write_text("file,label\nred.png,0\n")
    with pytest.raises(InvalidInput, match=r"red\.png"):
        accuracy_on_images(Brightest(), LabelledImages.read(images, images / "labels.csv"), 1)  # type: ignore[arg-type]


def test_the_models_own_normalisation_is_used(images: Path) -> None:
    (images / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 1], "image_std": [1, 1, 1]}')
    data = LabelledImages.read(images, images / "labels.csv", images)
    assert data.mean == [0.0, 0.0, 1.0]
    # A blue that is darkened by 1 is no longer the brightest: red and green tie, and the first wins.
    assert accuracy_on_images(Brightest(), data, 3).value == 1.0  # type: ignore[arg-type]


def test_a_model_of_text_needs_a_function() -> None:
    model = Brightest()
    model.inputs = (TensorSpec("input_ids", "INT64", (16,)),)
    with pytest.raises(InvalidInput, match="--data"):
        accuracy_on_images(model, LabelledImages(folder=Path(), labels={}), 1)  # type: ignore[arg-type]


def count(model: Any) -> tuple[int, int]:
    return len(model.inputs), 4


def test_a_function_of_the_user_counts() -> None:
    function = load_function(f"{__name__}:count") if "." in __name__ else count
    measured = accuracy_by_function(Brightest(), function, "data:count")  # type: ignore[arg-type]
    assert (measured.value, measured.samples, measured.metric) == (0.25, 4, "count")


@pytest.mark.parametrize("name", ["json", "json:", "no_such_module:f", "json:no_such_function", "json:__doc__"])
def test_a_function_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="--data"):
        load_function(name)


@pytest.mark.parametrize("counts", [0.5, (1,), (2, 1), (0, 0), (1.0, 2), (-1, 2)])
def test_counts_that_are_none_are_refused(counts: Any) -> None:
    with pytest.raises(InvalidInput, match="data:count"):
        accuracy_by_function(Brightest(), lambda model: counts, "data:count")  # type: ignore[arg-type, return-value]


def test_images_are_scaled_to_what_the_model_takes(images: Path) -> None:
    seen: list[Any] = []
    model = Brightest()
    model.run = lambda inputs: seen.append(inputs["pixel_values"]) or {"logits": np.zeros((3, 3))}  # type: ignore[method-assign]
    accuracy_on_images(model, LabelledImages.read(images, images / "labels.csv"), 3)  # type: ignore[arg-type]
    assert seen[0].shape == (3, 3, 8, 8)
    assert seen[0].dtype == np.float32
