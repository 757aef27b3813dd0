"""Put together what several runs measured of one model on one GPU type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plans.errors import InvalidInput
from profiles.document import Profile, Row, Source

__all__ = ["add_rows", "check_trust", "is_same_way", "merge_profiles"]

_TRUST: tuple[Source, ...] = ("modelled", "imported", "measured")
"""Sources, the least trustworthy first."""


def merge_profiles(old: Profile, new: Profile) -> Profile:
    """Return ``new`` with the rows of ``old`` at parallelisms and phases that ``new`` has none of.

    What belongs to the whole model (key-value bytes, slow-downs, accuracy) is kept where ``new`` does not say it. A
    profile that was not measured the same way (source, type of number, or options) gives way whole.

    Raises:
        InvalidInput: They are of different models or GPU types.
    """
    _check_same(old, new)
    if not is_same_way(old, new):
        return new
    measured = {(row.phase, row.tp, row.pp) for row in new.rows}
    kept = [row for row in old.rows if (row.phase, row.tp, row.pp) not in measured]
    return new.model_copy(update=_joined(old, new, kept))


def add_rows(old: Profile, new: Profile) -> Profile:
    """Return ``new`` with the rows of ``old`` that it does not repeat: many tools write a file for each point.

    A less trustworthy profile, or one of another type of number, gives way whole.

    Raises:
        InvalidInput: They are of different models or GPU types, or ``old`` is more trustworthy.
    """
    _check_same(old, new)
    check_trust(old, new.source)
    if not is_same_way(old, new):
        return new
    keys = {row.key for row in new.rows}
    return new.model_copy(update=_joined(old, new, [row for row in old.rows if row.key not in keys]))


def check_trust(old: Profile, source: Source) -> None:
    """Check that a profile of ``source`` may take the place of ``old``.

    Raises:
        InvalidInput: ``old`` is more trustworthy.
    """
    if _TRUST.index(old.source) > _TRUST.index(source):
        found = f"a profile that was {old.source}, and this one is {source}"
        expected = "no more trustworthy profile in its place"
        remedy = "write to another folder, or delete the file"
        raise InvalidInput.of(expected, where=f"{old.model} on {old.gpu_type}", found=found, remedy=remedy)


def is_same_way(old: Profile, new: Profile) -> bool:
    """Return whether both came about in the same way, so that their rows may stand beside each other."""
    return (old.source, old.meta.dtype, old.meta.options) == (new.source, new.meta.dtype, new.meta.options)


def _check_same(old: Profile, new: Profile) -> None:
    if (old.model, old.gpu_type) != (new.model, new.gpu_type):
        found = f"{old.model} on {old.gpu_type}"
        raise InvalidInput.of(f"a profile of {new.model} on {new.gpu_type}", field="model", found=found)


def _joined(old: Profile, new: Profile, kept: Sequence[Row]) -> dict[str, Any]:
    """Return the fields of ``new`` with the rows ``kept`` of ``old``, their origins, and what only ``old`` says."""
    used = sorted({row.origin for row in kept if row.origin is not None})
    places = {origin: len(new.origins) + position for position, origin in enumerate(used)}
    moved = (row if row.origin is None else row.model_copy(update={"origin": places[row.origin]}) for row in kept)
    return {
        "rows": (*new.rows, *moved),
        "origins": (*new.origins, *(old.origins[origin] for origin in used)),
        "kv_bytes_per_token": new.kv_bytes_per_token or old.kv_bytes_per_token,
        "interference": new.interference or old.interference,
        "neighbours": new.neighbours or old.neighbours,
        "accuracy": new.accuracy or old.accuracy,
    }
