from __future__ import annotations

from typing import Any

import pytest

from plans.errors import InvalidInput
from profiles.document import Accuracy, Origin, Profile, ProfileMeta, Row, Source
from profiles.merging import add_rows, check_trust, merge_profiles
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


@pytest.mark.parametrize(
    "meta", [{"dtype": "bf16"}, {"options": {"threads": "2"}}, {"options": {"compile": "default"}}]
)
def test_rows_that_were_measured_otherwise_give_way(meta: dict[str, Any]) -> None:
    old = profile(row(1, 0.1)).model_copy(update={"meta": ProfileMeta(**meta)})
    assert {each.tp for each in merge_profiles(old, profile(row(1, 0.3, tp=2))).rows} == {2}


def test_other_models_are_refused() -> None:
    with pytest.raises(InvalidInput, match="model"):
        merge_profiles(profile(row(1, 0.1), model="other"), profile(row(1, 0.1)))


def imported(*rows: Row, file: str = "a", source: Source = "imported") -> Profile:
    return Profile(model="m", gpu_type="g", source=source, rows=rows, origins=(Origin(file=file),))


def test_files_of_one_point_each_add_up() -> None:
    whole = imported(row(1, 0.1, origin=0), file="one")
    for name, each in (("two", row(2, 0.2, origin=0)), ("again", row(1, 0.15, origin=0)), ("four", row(4, 0.4))):
        whole = add_rows(whole, imported(each, file=name))
    assert sorted((each.batch, each.latency_s.mean) for each in whole.rows) == [(1, 0.15), (2, 0.2), (4, 0.4)]
    files = {each.batch: whole.origins[each.origin].file for each in whole.rows if each.origin is not None}
    assert files == {1: "again", 2: "two"}
    assert "one" not in {origin.file for origin in whole.origins}  # nothing of it is left
    assert Profile.model_validate(whole.model_dump()) == whole


def test_adding_the_same_file_twice_changes_nothing() -> None:
    old, new = imported(row(1, 0.1, origin=0), file="one"), imported(row(2, 0.2, origin=0), file="two")
    once = add_rows(old, new)
    assert add_rows(once, new) == once


@pytest.mark.parametrize(("old", "new"), [("measured", "imported"), ("measured", "modelled"), ("imported", "modelled")])
def test_what_is_more_trustworthy_is_not_replaced(old: Source, new: Source) -> None:
    known = imported(row(1, 0.1), source=old)
    with pytest.raises(InvalidInput, match=f"was {old}, and this one is {new}"):
        add_rows(known, imported(row(2, 0.1), source=new))
    check_trust(known, old)


def test_what_is_less_trustworthy_gives_way_whole() -> None:
    assert len(add_rows(imported(row(1, 0.1), source="modelled"), imported(row(2, 0.1))).rows) == 1
