from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings

from plans.documents import parse_document, write_document
from plans.errors import InvalidInput
from profiles.document import Profile
from tests.profiles.documents import GRIDS, curve


def document(**row: Any) -> str:
    """The example of the design, with fields of its only row replaced."""
    fields: dict[str, Any] = {
        "tp": 1,
        "pp": 1,
        "batch": 1,
        "concurrency": 1,
        "input_tokens": None,
        "output_tokens": None,
        "latency_s": {"mean": 0.006, "p50": 0.006, "p95": 0.0062, "p99": 0.0065},
        "stage_latency_s": [0.006],
        "weight_bytes": [102000000],
        "peak_bytes": [310000000],
        "load_s": 0.55,
        "first_inference_s": 0.14,
        "samples": 500,
    }
    fields.update(row)
    return json.dumps(
        {
            "format_version": "1.0",
            "model": "resnet50",
            "gpu_type": "h100-80gb",
            "source": "measured",
            "meta": {"device_name": "", "driver": "", "torch": "", "dtype": "fp16", "input": "3x224x224"},
            "rows": [fields],
        }
    )


def faults(text: str) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        parse_document(text, Profile, where="p.json")
    return [str(fault) for fault in caught.value.faults]


def test_the_documented_example_is_a_profile() -> None:
    parsed = parse_document(document(), Profile, where="p.json")
    assert parsed.rows[0].latency_s.p99 == 0.0065
    assert parsed.rows[0].peak_bytes == (310000000,)


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        ({"batch": 0}, "rows[0].batch", "greater than or equal to 1"),
        ({"batch": 1.5}, "rows[0].batch", "integer"),
        ({"latency_s": {"mean": 0}}, "rows[0].latency_s.mean", "greater than 0"),
        ({"latency_s": {"mean": -0.1}}, "rows[0].latency_s.mean", "greater than 0"),
        ({"latency_s": {"mean": "soon"}}, "rows[0].latency_s.mean", "duration"),
        ({"latency_s": {"p50": 0.1}}, "rows[0].latency_s.mean", "this field"),
        ({"latency_s": {"mean": 1, "p50": 1, "p95": 0.9}}, "rows[0].latency_s.p95", "at least p50 = 1"),
        ({"latency_s": {"mean": 1, "p95": 1, "p99": 0.9}}, "rows[0].latency_s.p99", "at least p95 = 1"),
        ({"latency_s": {"mean": 1, "p50": 1, "p99": 0.9}}, "rows[0].latency_s.p99", "at least p50 = 1"),
        (
            {"stage_latency_s": [0.003, 0.003]},
            "rows[0].stage_latency_s",
            "one entry per pipeline stage (pp = 1), not 2",
        ),
        ({"pp": 2}, "rows[0].weight_bytes", "one entry per pipeline stage (pp = 2), not 1"),
        ({"stage_latency_s": [0]}, "rows[0].stage_latency_s[0]", "greater than 0"),
        ({"weight_bytes": [-1]}, "rows[0].weight_bytes[0]", "greater than or equal to 0"),
        ({"peak_bytes": [101999999]}, "rows[0].peak_bytes", "at least the weights of stage 0"),
        ({"speed": 1}, "rows[0].speed", "foreplan schema"),
        ({"load_s": -1}, "rows[0].load_s", "greater than or equal to 0"),
    ],
)
def test_an_impossible_row_is_refused_by_field(row: dict[str, Any], field: str, expected: str) -> None:
    found = [fault for fault in faults(document(**row)) if f" {field}:" in fault]
    assert len(found) == 1
    assert expected in found[0]


def test_all_faults_of_a_row_are_named_at_once() -> None:
    assert len(faults(document(batch=0, pp=2, load_s=-1))) == 5  # pp = 2 leaves three lists too short


def test_sizes_and_times_take_human_units() -> None:
    parsed = parse_document(document(weight_bytes=["100MB"], latency_s={"mean": "6ms"}), Profile, where="p.json")
    assert parsed.rows[0].weight_bytes == (100_000_000,)
    assert parsed.rows[0].latency_s.mean == 0.006


def test_the_same_point_twice_is_refused() -> None:
    data = json.loads(document())
    data["rows"] *= 2
    assert "rows[1] repeats rows[0]" in faults(json.dumps(data))[0]


def test_a_profile_without_rows_is_refused() -> None:
    data = json.loads(document())
    data["rows"] = []
    assert " rows:" in faults(json.dumps(data))[0]


def test_an_unknown_source_is_refused() -> None:
    assert " source:" in faults(document().replace('"measured"', '"guessed"'))[0]


@settings(deadline=None)  # writes to disk, and waits for it
@given(GRIDS)
def test_reading_what_was_written_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory, means: dict[int, float]
) -> None:
    path = tmp_path_factory.mktemp("profile") / "p.json"
    written = curve(means)
    write_document(path, written)
    assert parse_document(path.read_text(), Profile, where="p.json") == written


def test_a_newer_minor_version_may_add_fields_anywhere_and_an_older_one_may_not() -> None:
    newer = json.loads(document(humidity=0.4)) | {"format_version": "1.99", "mood": "good"}
    newer["meta"]["colour"] = "red"
    parsed = parse_document(json.dumps(newer), Profile, where="p.json")
    assert parsed.rows[0].batch == 1
    assert parsed.meta.dtype == "fp16"
    unknown = faults(json.dumps(newer | {"format_version": "1.1"}))
    assert len(unknown) == 3
    assert all("unknown field" in fault for fault in unknown)


def test_an_unknown_major_version_is_refused() -> None:
    (fault,) = faults(json.dumps(json.loads(document()) | {"format_version": "2.0"}))
    assert "major version 1" in fault


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"interference": {"2": 0.9}}, "greater than or equal to 1"),
        ({"interference": {"2": 1.8, "3": 1.5}}, "never fall"),
        ({"interference": {"1": 1.2}}, "1 for one batch"),
        ({"interference": {"0": 1.0}}, "from 1"),
        ({"kv_bytes_per_token": 0}, "greater than or equal to 1"),
        ({"accuracy": {"value": 1.2}}, "less than or equal to 1"),
        ({"neighbours": [{"model": "b", "batch": 1, "neighbour_batch": 1, "factor": 0.5}]}, "greater than or equal"),
    ],
)
def test_what_cannot_be_true_of_the_whole_model_is_refused(fields: dict[str, Any], said: str) -> None:
    (fault,) = faults(json.dumps(json.loads(document()) | {"format_version": "1.1"} | fields))
    assert said in fault


def test_a_row_may_only_point_at_a_file_that_is_named() -> None:
    (fault,) = faults(document(origin=0))
    assert "rows[0].origin = 0" in fault


def test_slow_downs_are_read_by_number_and_sorted() -> None:
    text = json.dumps(json.loads(document()) | {"format_version": "1.1", "interference": {"4": 2.5, "2": 1.5}})
    assert list(parse_document(text, Profile, where="p.json").interference.items()) == [(2, 1.5), (4, 2.5)]
