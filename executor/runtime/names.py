"""The names of models: those of the registry, and those of local folders, which go before."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from executor.runtime.protocol import UnknownVariant
from executor.runtime.registry import REGISTRY, Architecture, architecture_of
from executor.runtime.sizes import split_size
from plans.errors import Fault, InvalidInput

__all__ = ["check_names", "local_model", "local_names", "model_names", "registered"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


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


def model_names(model_dir: Path | None) -> tuple[str, ...]:
    """Return every name that stands for a model at its own input size, sorted."""
    return tuple(sorted({*REGISTRY, *(local_names(model_dir) if model_dir else ())}))


def local_model(variant: str, model_dir: Path | None) -> tuple[str, int | None] | None:
    """Return the local model and the input size that ``variant`` names; None where it names no local model."""
    return split_size(variant, local_names(model_dir)) if model_dir is not None else None


def registered(variant: str, model_dir: Path | None) -> tuple[str, Architecture]:
    """Return the model of the registry that ``variant`` names, and how to build it; ``model_dir`` is for the message.

    Raises:
        UnknownVariant: There is none.
        InvalidInput: The model cannot have inputs of that size.
    """
    found = architecture_of(variant, REGISTRY)
    if found is None:
        names = model_names(model_dir)
        close = difflib.get_close_matches(variant, names, n=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else ""
        expected = "one of " + ", ".join(names) + "; at another input size, <name>-<size>"
        raise UnknownVariant.of(expected, field="variant", found=repr(variant), remedy=remedy)
    return found


def check_names(variants: Iterable[str], model_dir: Path | None) -> None:
    """Check that each of ``variants`` names a model, before any of them is built.

    Raises:
        InvalidInput: There is no such folder, or some name none; all faults.
    """
    if model_dir is not None and not model_dir.is_dir():
        raise InvalidInput.of("a folder of models", field="model_dir", found=model_dir)
    faults: list[Fault] = []
    for variant in variants:
        if local_model(variant, model_dir) is None:
            try:
                registered(variant, model_dir)
            except InvalidInput as error:
                faults.extend(error.faults)
    if faults:
        raise InvalidInput(faults)
