"""Variants by input size: ``<model>-<size>`` is a model at another size of its inputs.

The size is the side of square images in pixels, or the number of tokens of a text. This module knows names only.
"""

from __future__ import annotations

from collections.abc import Container

__all__ = ["sized_name", "split_size"]


def split_size(variant: str, known: Container[str]) -> tuple[str, int | None] | None:
    """Return the model and the size that ``variant`` names, the size None for the model's own; None if not ``known``.

    A model that is called so goes before the size of another: ``resnet-18`` is no ``resnet``.
    """
    if variant in known:
        return variant, None
    model, dash, size = variant.rpartition("-")
    if dash and model in known and size.isdecimal() and size.isascii() and not size.startswith("0"):
        return model, int(size)
    return None


def sized_name(model: str, size: int) -> str:
    """Return the name of ``model`` at inputs of ``size``."""
    return f"{model}-{size}"
