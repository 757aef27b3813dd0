from __future__ import annotations

import json
from pathlib import Path

import pytest

from plans.catalogue import catalogue
from plans.errors import InvalidInput
from profiles.importing import FORMATS, ImportOptions, import_profiles
from profiles.importing.ledger import Ledger, number
from profiles.roofline import REACHED_BANDWIDTH


def ledger(path: Path, **options: object) -> Ledger:
    path.write_text("content\n")
    defaults: dict[str, object] = {"model": "m", "gpu_type": "g", "weight_bytes": 100}
    return Ledger(path=path, tool="toy", unit="s", options=ImportOptions(**{**defaults, **options}))  # type: ignore[arg-type]


def test_every_row_is_taken_or_rejected_with_its_place_and_reason(tmp_path: Path) -> None:
    book = ledger(tmp_path / "f.csv")
    with book.row("line 2"):
        book.add(0.5, batch=1)
    with book.row("line 3"):
        book.add(0.5, batch=1)
    with book.row("line 4"):
        book.add(0.5, batch=0)
    with book.row("line 5"):
        book.add(number("n/a", "latency"), batch=2)
    imported = book.close()
    assert (imported.rows, imported.taken, len(imported.rejected)) == (4, 1, 3)
    assert imported.rows == imported.taken + len(imported.rejected)
    assert [each.place for each in imported.rejected] == ["line 3", "line 4", "line 5"]
    assert "repeats" in imported.rejected[0].reason
    assert "batch" in imported.rejected[1].reason
    assert imported.rejected[2].reason == "latency is missing"


def test_a_row_that_fails_halfway_leaves_nothing_behind(tmp_path: Path) -> None:
    book = ledger(tmp_path / "f.csv")
    with book.row("line 2"):
        book.add(0.5, batch=1)
    with book.row("line 3"):
        book.add(0.7, batch=2)
        raise ValueError("the second half is wrong")
    assert [row.batch for row in book.close().profiles[0].rows] == [1]


def test_where_rows_came_from_is_kept(tmp_path: Path) -> None:
    book = ledger(tmp_path / "f.csv")
    with book.row("line 2"):
        book.add(0.5, batch=1)
    (profile,) = book.close().profiles
    assert profile.source == "imported"
    assert profile.rows[0].origin == 0
    origin = profile.origins[0]
    assert (origin.file, origin.tool, origin.unit, origin.statistic) == ("f.csv", "toy", "s", "mean")
    assert len(origin.sha256) == 64


def test_memory_that_nobody_states_rejects_a_row_instead_of_counting_as_none(tmp_path: Path) -> None:
    book = ledger(tmp_path / "f.csv", weight_bytes=None)
    with book.row("line 2"):
        book.add(0.5, batch=1)
    with pytest.raises(InvalidInput, match="1 x memory is not stated: pass --weights or --peak"):
        book.close()


def test_what_the_user_states_goes_before_the_file(tmp_path: Path) -> None:
    book = ledger(tmp_path / "f.csv", peak_bytes=300)
    with book.row("line 2"):
        book.add(0.5, model="other", gpu_type="other", batch=1, weight_bytes=(7,), peak_bytes=(8,))
    (profile,) = book.close().profiles
    assert (profile.model, profile.gpu_type) == ("m", "g")
    assert (profile.rows[0].weight_bytes, profile.rows[0].peak_bytes) == ((100,), (300,))


@pytest.mark.parametrize(("model", "name"), [("meta-llama/Llama-3.1-8B", "Llama-3.1-8B"), ("a b (c)", "a-b--c")])
def test_names_become_such_that_can_stand_in_a_file_name(tmp_path: Path, model: str, name: str) -> None:
    book = ledger(tmp_path / "f.csv", model=model)
    with book.row("line 2"):
        book.add(0.5, batch=1)
    assert book.close().profiles[0].model == name


@pytest.mark.parametrize("text", ["", "nan", "inf", "abc", "0", "-1", None])
def test_what_is_no_positive_number_is_refused(text: str | None) -> None:
    with pytest.raises(ValueError, match="latency"):
        number(text, "latency")


def test_thousands_separators_and_units_are_read() -> None:
    assert number(" 1,234.5 ", "latency", scale=1e-3) == pytest.approx(1.2345)


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="aiconfigurator, aiperf"):
        import_profiles("excel", tmp_path / "x.xls")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("suffix", ["csv", "json", "txt"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b"a,b\n1,2\n", b"[]", b'{"x": 1}'])
def test_a_file_that_is_none_of_the_format_is_refused_by_every_importer(
    tmp_path: Path, kind: str, suffix: str, content: bytes | None
) -> None:
    path = tmp_path / f"file.{suffix}"
    if content is not None:
        path.write_bytes(content)
    options = ImportOptions(
        model="m", gpu_type="g", weight_bytes=1, layers=1, input_buckets=(100,), output_buckets=(100,)
    )
    with pytest.raises(InvalidInput, match=r"file\."):
        import_profiles(kind, path, options)


@pytest.mark.parametrize("value", [{"models": {"m": 5}}, {"models": {"m": {"configs": [{"latency_s": {"1": 3}}]}}}])
def test_values_of_another_shape_reject_the_row(tmp_path: Path, value: object) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InvalidInput, match=r"malformed|no row"):
        import_profiles("alpaserve", path, ImportOptions(gpu_type="g"))


def test_a_load_is_as_long_as_the_weights_take_from_the_host_to_a_type_of_the_catalogue(tmp_path: Path) -> None:
    loads = {}
    for gpu_type in ("l4-24gb", "nobody-knows"):
        path = tmp_path / "p.csv"
        path.write_text(f"Model,Accel,batchsize,avg_latency(ms)\ntiny,{gpu_type},1,4.0\n")
        imported = import_profiles("proteus", path, ImportOptions(weight_bytes=10**9))
        loads[gpu_type] = imported.profiles[0].rows[0].load_s
        assert any(note.startswith("loads ") for note in imported.notes)
    expected = 10**9 / (REACHED_BANDWIDTH * catalogue()["l4-24gb"].host_bandwidth)
    assert loads == {"l4-24gb": pytest.approx(expected), "nobody-knows": 0.0}
