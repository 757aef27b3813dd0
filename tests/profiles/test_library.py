from __future__ import annotations

from pathlib import Path

import pytest

from plans.documents import write_document
from plans.errors import InvalidInput
from profiles.library import ProfileLibrary
from tests.profiles.documents import curve, profile, row


def test_every_fault_of_every_file_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"format_version": "1.0", "model": ')
    (tmp_path / "empty.json").write_text("{}")
    write_document(tmp_path / "a.json", curve({1: 0.1}))
    (tmp_path / "inner").mkdir()
    write_document(tmp_path / "inner" / "b.json", curve({1: 0.2}))
    with pytest.raises(InvalidInput) as caught:
        ProfileLibrary.read(tmp_path)
    named = {Path(fault.where).name for fault in caught.value.faults}
    assert named == {"broken.json", "empty.json", "b.json"}
    assert "a second profile of resnet-18 on cpu" in str(caught.value)


@pytest.mark.parametrize("missing", ["nowhere", "empty"])
def test_a_folder_without_profiles_is_refused(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=missing):
        ProfileLibrary.read(tmp_path / missing)


def test_two_profiles_of_one_model_and_gpu_type_are_refused() -> None:
    with pytest.raises(InvalidInput, match="one profile per model"):
        ProfileLibrary([curve({1: 0.1}), curve({2: 0.1})])


def test_reading_finds_nested_files(tmp_path: Path) -> None:
    (tmp_path / "h100").mkdir()
    write_document(tmp_path / "h100" / "p.json", curve({1: 0.1}, gpu_type="h100"))
    write_document(tmp_path / "p.json", curve({1: 0.3}))
    library = ProfileLibrary.read(tmp_path)
    assert [(p.model, p.gpu_type) for p in library] == [("resnet-18", "cpu"), ("resnet-18", "h100")]
    assert len(library) == 2


def test_the_digest_ignores_order_and_sees_every_number() -> None:
    one, two, other = curve({1: 0.1}), curve({1: 0.1}, gpu_type="h100"), curve({1: 0.2}, gpu_type="h100")
    assert ProfileLibrary([one, two]).digest == ProfileLibrary([two, one]).digest
    assert ProfileLibrary([one, two]).digest != ProfileLibrary([one, other]).digest


def test_what_is_not_profiled_is_none() -> None:
    library = ProfileLibrary([curve({1: 0.1})])
    assert library.profile("resnet-50", "cpu") is None
    assert library.latency("resnet-50", "cpu", 1, 1) is None
    assert library.latency("resnet-18", "cpu", 2, 1) is None
    assert library.parallelisms("resnet-18", "h100") == ()


def test_parallelisms_are_those_of_the_rows() -> None:
    library = ProfileLibrary([profile(row(1, 0.1, pp=2), row(1, 0.2), row(1, 0.1, tp=2), row(2, 0.3))])
    assert library.parallelisms("resnet-18", "cpu") == ((1, 1), (1, 2), (2, 1))


def test_a_latency_model_is_fitted_once_per_question() -> None:
    library = ProfileLibrary([curve({1: 0.1})])
    model = library.latency("resnet-18", "cpu", 1, 1)
    assert model is not None
    assert library.latency("resnet-18", "cpu", 1, 1) is model
    assert library.latency("resnet-18", "cpu", 1, 1, input_tokens=8) is not model
