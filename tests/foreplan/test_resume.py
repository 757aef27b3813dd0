from __future__ import annotations

from pathlib import Path

from foreplan.device import Device
from foreplan.resume import RowStore
from profiles.group import Grid, Series
from profiles.profiler import StopRule
from tests.profiles.documents import row

DEVICE = Device(gpu_type="cpu")


def store(folder: Path, device: Device = DEVICE, **grid: object) -> RowStore:
    return RowStore(folder, device, Grid(**grid), StopRule())  # type: ignore[arg-type]


def test_rows_survive_the_process_until_the_profile_is_written(tmp_path: Path) -> None:
    first = store(tmp_path)
    first.add("m", row(1, 0.1))
    first.add("m", row(2, 0.2))
    assert [each.batch for each in store(tmp_path).rows("m")] == [1, 2]
    assert store(tmp_path).rows("other") == ()
    store(tmp_path).forget("m")
    assert store(tmp_path).rows("m") == ()
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_finished_for_the_grid_that_was_measured(tmp_path: Path) -> None:
    first = store(tmp_path, batches=(1, 2))
    first.add("m", row(1, 0.1))
    assert not store(tmp_path, batches=(1, 2)).is_finished("m")
    first.finish("m")
    again = store(tmp_path, batches=(1, 2))
    assert again.is_finished("m")
    assert [each.batch for each in again.rows("m")] == [1]
    assert not again.is_finished("other")
    assert not store(tmp_path, batches=(1, 2, 4)).is_finished("m")
    assert not store(tmp_path, Device(gpu_type="cpu", dtype="bf16"), batches=(1, 2)).is_finished("m")
    again.forget("m")
    assert not again.is_finished("m")


def test_more_batches_are_still_the_same_measurement(tmp_path: Path) -> None:
    store(tmp_path, batches=(1,)).add("m", row(1, 0.1))
    assert len(store(tmp_path, batches=(1, 2)).rows("m")) == 1


def test_rows_measured_otherwise_do_not_count(tmp_path: Path) -> None:
    store(tmp_path).add("m", row(1, 0.1))
    assert store(tmp_path, Device(gpu_type="cpu", threads=2)).rows("m") == ()
    assert store(tmp_path, series=(Series(phase="decode", input_tokens=8),)).rows("m") == ()


def test_a_damaged_state_costs_only_time(tmp_path: Path) -> None:
    first = store(tmp_path)
    first.add("m", row(1, 0.1))
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-20])
    assert store(tmp_path).rows("m") == ()


def test_the_state_is_no_profile_of_the_folder(tmp_path: Path) -> None:
    store(tmp_path).add("m", row(1, 0.1))
    assert list(tmp_path.glob("*.json")) == []
