"""Human units in documents: ``150ms``, ``80GiB``, ``25Gb/s``. Inside, all is seconds, bytes and bytes per second.

A bare number is taken in the inner unit. Upper-case ``B`` is bytes and lower-case ``b`` bits; ``Ki Mi Gi Ti`` are
powers of 1024 and ``k K M G T`` powers of 1000.
"""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

__all__ = [
    "Bytes",
    "BytesPerSecond",
    "PositiveSeconds",
    "Seconds",
    "format_bytes",
    "format_seconds",
    "parse_bandwidth",
    "parse_bytes",
    "parse_seconds",
]

_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_PREFIX = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_PREFIX |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_NUMBER = r"([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)"
_TIME = re.compile(rf"{_NUMBER}\s*(ns|us|µs|ms|s|min|m|h|d)")
_SIZE = re.compile(rf"{_NUMBER}\s*(|k|K|M|G|T|Ki|Mi|Gi|Ti)(B|b)")


def _finite(value: float, text: object) -> float:
    if isinstance(text, bool) or not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def parse_seconds(value: object) -> float:
    """Return seconds for a number or a text such as ``150ms``, ``2.5 s``, ``5min``.

    Raises:
        ValueError: The text is no duration.
    """
    if isinstance(value, int | float):
        return _finite(float(value), value)
    match = _TIME.fullmatch(str(value).strip())
    if match is None:
        raise ValueError("a duration such as 150ms, 2.5s or 5min")
    return float(match[1]) * _SECONDS[match[2]]


def _parse_size(value: object, suffix: str, example: str) -> float:
    if isinstance(value, int | float):
        return _finite(float(value), value)
    text = str(value).strip()
    match = _SIZE.fullmatch(text.removesuffix(suffix)) if text.endswith(suffix) else None
    if match is None:
        raise ValueError(f"a {example}")
    return float(match[1]) * _PREFIX[match[2]] / (8 if match[3] == "b" else 1)


def parse_bytes(value: object) -> int:
    """Return bytes for a number or a text such as ``80GiB`` or ``150KB``; a fraction of a byte rounds up.

    Raises:
        ValueError: The text is no size.
    """
    return math.ceil(_parse_size(value, "", "size such as 80GiB or 150KB"))


def parse_bandwidth(value: object) -> float:
    """Return bytes per second for a number or a text such as ``25Gb/s`` (bits) or ``12GB/s`` (bytes).

    Raises:
        ValueError: The text is no bandwidth.
    """
    return _parse_size(value, "/s", "bandwidth such as 25Gb/s or 12GB/s")


def format_seconds(value: float) -> str:
    """Return a short text for a duration, such as ``12.3 ms``."""
    for limit, unit, scale in ((1e-3, "us", 1e6), (1.0, "ms", 1e3), (120.0, "s", 1.0), (7200.0, "min", 1 / 60)):
        if abs(value) < limit:
            return f"{value * scale:.3g} {unit}"
    return f"{value / 3600:.3g} h"


def format_bytes(value: float) -> str:
    """Return a short text for a size, such as ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def _unit_schema(example: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}], "examples": [example]})


Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(ge=0), _unit_schema("150ms")]
PositiveSeconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0), _unit_schema("150ms")]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0), _unit_schema("80GiB")]
BytesPerSecond = Annotated[float, BeforeValidator(parse_bandwidth), Field(gt=0), _unit_schema("25Gb/s")]
