"""Put together what several runs measured of one model on one GPU type."""

from __future__ import annotations

from plans.errors import InvalidInput
from profiles.document import Profile

__all__ = ["merge_profiles"]


def merge_profiles(old: Profile, new: Profile) -> Profile:
    """Return ``new`` with the rows of ``old`` at parallelisms and phases that ``new`` has none of.

    What belongs to the whole model (key-value bytes, slow-downs, accuracy) is kept where ``new`` does not say it. A
    profile that was not measured the same way (source, or type of number) gives way whole.

    Raises:
        InvalidInput: They are of different models or GPU types.
    """
    if (old.model, old.gpu_type) != (new.model, new.gpu_type):
        found = f"{old.model} on {old.gpu_type}"
        raise InvalidInput.of(f"a profile of {new.model} on {new.gpu_type}", field="model", found=found)
    if (old.source, old.meta.dtype) != (new.source, new.meta.dtype):
        return new
    measured = {(row.phase, row.tp, row.pp) for row in new.rows}
    kept = [row for row in old.rows if (row.phase, row.tp, row.pp) not in measured]
    moved = tuple(
        row if row.origin is None else row.model_copy(update={"origin": row.origin + len(new.origins)}) for row in kept
    )
    return new.model_copy(
        update={
            "rows": (*new.rows, *moved),
            "origins": (*new.origins, *old.origins),
            "kv_bytes_per_token": new.kv_bytes_per_token or old.kv_bytes_per_token,
            "interference": new.interference or old.interference,
            "neighbours": new.neighbours or old.neighbours,
            "accuracy": new.accuracy or old.accuracy,
        }
    )
