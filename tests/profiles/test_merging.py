from __future__ import annotations

import pytest

from plans.errors import InvalidInput
from profiles.document import Accuracy, Origin, Profile
from profiles.merging import merge_profiles
from tests.profiles.documents import curve, profile, row


def test_rows_of_another_parallelism_are_kept_and_those_of_the_same_give_way() -> None:
    old = profile(row(1, 0.1), row(2, 0.2), row(1, 0.05, tp=2)).model_copy(
        update={"accuracy": Accuracy(value=0.7), "interference": {2: 1.5}}
    )
    merged = merge_profiles(old, profile(row(1, 0.3)))
    assert [(each.tp, each.batch, each.latency_s.mean) for each in merged.rows] == [(1, 1, 0.3), (2, 1, 0.05)]
    assert merged.accuracy == Accuracy(value=0.7)
    assert merged.interference == {2: 1.5}


def test_merging_twice_changes_nothing() -> None:
    old, new = profile(row(1, 0.1, tp=2)), profile(row(1, 0.3))
    once = merge_profiles(old, new)
    assert merge_profiles(once, new) == once


def test_origins_of_kept_rows_still_point_at_their_file() -> None:
    old, new = (
        Profile(
            model="m",
            gpu_type="g",
            source="imported",
            rows=(row(1, 0.1, tp=tp, origin=0),),
            origins=(Origin(file=name),),
        )
        for tp, name in ((2, "old"), (1, "new"))
    )
    merged = merge_profiles(old, new)
    assert [merged.origins[each.origin or 0].file for each in merged.rows] == ["new", "old"]


def test_numbers_of_another_kind_are_not_mixed() -> None:
    assert merge_profiles(curve({1: 0.1}, source="modelled"), profile(row(1, 0.3, tp=2))).rows[0].tp == 2
    assert len(merge_profiles(curve({1: 0.1}, source="modelled"), profile(row(1, 0.3, tp=2))).rows) == 1


def test_other_models_are_refused() -> None:
    with pytest.raises(InvalidInput, match="model"):
        merge_profiles(profile(row(1, 0.1), model="other"), profile(row(1, 0.1)))
