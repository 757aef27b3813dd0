from __future__ import annotations

import json
import os

import pytest
from hypothesis import given

from plans import BadStoredData, InvalidInput, PlanStore
from tests.plans.strategies import entry, group, plan, plans

ONE = plan([group("node-0", (0,), [entry("detect")])])


@given(plans())
def test_what_is_put_in_comes_out(tmp_path_factory, one):
    store = PlanStore(tmp_path_factory.mktemp("store"))
    name = store.put(one)
    assert store.put(one) == name
    assert store.get(name) == one


def test_an_empty_store_has_no_current_plan(tmp_path):
    store = PlanStore(tmp_path / "not-made-yet")
    assert store.current() is None
    assert store.generations() == ()


def test_generations_are_kept_and_the_last_recorded_is_current(tmp_path):
    store = PlanStore(tmp_path)
    store.record(1, ONE, applied_at="2026-01-01T00:00:00Z")
    store.record(2, plan([]), applied_at="2026-01-02T00:00:00Z")
    current = store.current()
    assert current is not None
    assert (current.generation, store.get(current.name)) == (2, plan([]))
    assert [stored.generation for stored in store.generations()] == [1, 2]
    assert store.get(store.generation(1).name) == ONE


def test_plans_are_named_the_last_one_first_whether_noted_or_not(tmp_path):
    store = PlanStore(tmp_path)
    assert store.names() == ()
    noted = store.record(1, ONE, applied_at="")
    os.utime(noted.path, ns=(0, 0))
    other = store.put(plan([]))
    assert store.names() == (other, noted.name)


def test_an_unknown_generation_or_plan_is_named(tmp_path):
    store = PlanStore(tmp_path)
    store.record(1, ONE, applied_at="")
    with pytest.raises(InvalidInput, match=r"found 7, expected a stored generation \(1\)"):
        store.generation(7)
    with pytest.raises(InvalidInput, match="sha256-0"):
        store.get("sha256-0")


def test_damage_is_noticed(tmp_path):
    store = PlanStore(tmp_path)
    stored = store.record(1, ONE, applied_at="")
    stored.path.write_text(stored.path.read_text() + " ")
    with pytest.raises(BadStoredData, match="does not match its digest"):
        store.get(stored.name)
    (tmp_path / "generations" / "0000000001.json").write_text("{")
    with pytest.raises(BadStoredData, match="generation record"):
        store.current()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("generation", "x"),
        ("generation", None),
        ("generation", 0),
        ("plan", "../../x"),
        ("plan", "sha256-0"),
        ("plan", f"sha256-{'0' * 64}/../../../x"),
        ("plan", None),
        ("applied_at", 5),
        ("added", 1),
    ],
)
def test_a_record_that_no_apply_wrote_is_damaged(tmp_path, field, value):
    store = PlanStore(tmp_path)
    store.record(1, ONE, applied_at="")
    path = tmp_path / "generations" / "0000000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    for call in (store.current, store.generations):
        with pytest.raises(
            BadStoredData, match=rf"0000000001\.json:1: {field}: found .*; restore this generation record"
        ):
            call()


@pytest.mark.parametrize("text", ["seven", "", "-1", "\u00b2", "1" * 400, "1" * 5000])
def test_a_pointer_that_is_no_generation_is_damaged(tmp_path, text):
    store = PlanStore(tmp_path)
    store.record(1, ONE, applied_at="")
    (tmp_path / "current").write_text(text)
    with pytest.raises(BadStoredData, match=f"a generation number was expected, found '{text[:40]}'$"):
        store.current()


def test_a_damaged_plan_is_mended_when_it_is_stored_again(tmp_path):
    store = PlanStore(tmp_path)
    name = store.put(ONE)
    (tmp_path / "plans" / f"{name}.json").write_text("{")
    assert store.put(ONE) == name
    assert store.get(name) == ONE
