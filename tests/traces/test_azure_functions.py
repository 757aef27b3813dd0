import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from plans.errors import InvalidInput
from traces.azure_functions import read_azure_functions
from traces.files import trace_kind

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "examples" / "azure_sample"
REAL = ROOT.parent / "shared" / "data" / "azure_functions_2019"
HEADER = ",".join(["HashOwner", "HashApp", "HashFunction", "Trigger", *map(str, range(1, 1441))])


def row_of(function, counts, owner="o", app="a", trigger="http"):
    cells = [str(count) for count in counts] + ["0"] * (1440 - len(counts))
    return ",".join([owner, app, function, trigger, *cells])


def day_file(folder, day, *rows, header=HEADER):
    path = folder / f"invocations_per_function_md.anon.d{day:02d}.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def faults_of(call):
    with pytest.raises(InvalidInput) as caught:
        call()
    return [str(fault) for fault in caught.value.faults]


@pytest.fixture
def week(tmp_path):
    """Three days of four functions; f3 is invoked on the second alone."""
    for day in (1, 2, 3):
        rows = [row_of("f0", [day, 0, 5]), row_of("f1", [10 * day]), row_of("f2", [0, 1])]
        rows += [row_of("f3", [0, 0, 100])] if day == 2 else []
        day_file(tmp_path, day, *reversed(rows) if day == 3 else rows)
    return tmp_path


def test_days_follow_each_other_and_functions_are_ranked_by_all_their_invocations(week):
    read = read_azure_functions(week)
    rates = read.value.rates
    assert read.value.days == (1, 2, 3)
    assert (rates.windows, rates.window_s, rates.start_s) == (3 * 1440, 60.0, 0.0)
    assert [(a.function, a.invocations) for a in read.value.assignments] == [
        ("f3", 100),
        ("f1", 60),
        ("f0", 21),
        ("f2", 3),
    ]
    assert rates.services == ("function-01", "function-02", "function-03", "function-04")
    counts = rates.counts()
    assert counts.sum(axis=1).tolist() == [100, 60, 21, 3]
    assert counts[0, 1442] == 100
    assert counts[2, [0, 2, 1440, 2880]].tolist() == [1, 5, 2, 3]
    assert read.rows == (3 * 3 + 1) * 1440
    assert (read.rejected, read.notes) == (0, ())


def test_files_may_be_given_as_folder_pattern_or_list_in_any_order(week):
    whole = read_azure_functions(week).value
    files = sorted(week.iterdir())
    assert read_azure_functions(week / "*.d0?.csv").value == whole
    assert read_azure_functions(files[::-1]).value == whole
    assert read_azure_functions([files[2], *files[:2]]).value == whole
    assert read_azure_functions(files[0]).value.days == (1,)


def test_a_missing_day_is_a_gap_and_a_note_says_so(week):
    (week / "invocations_per_function_md.anon.d02.csv").unlink()
    read = read_azure_functions(week)
    assert "day 2" in read.notes[0]
    assert read.value.rates.windows == 3 * 1440
    assert read.value.rates.gaps == 1440 * 3


def test_one_file_may_have_any_name(week):
    path = (week / "invocations_per_function_md.anon.d02.csv").rename(week / "mine.csv")
    read = read_azure_functions(path)
    assert read.value.days == (1,)
    assert "day 1" in read.notes[0]


def test_a_day_given_twice_or_without_number_is_refused(week):
    other = week / "other"
    other.mkdir()
    again = day_file(other, 1, row_of("f0", [1]))
    unnamed = (other / "x.csv", again.write_text(again.read_text()))[0]
    faults = faults_of(lambda: read_azure_functions([week / "*.d01.csv", again, unnamed]))
    assert any("day 1 again" in fault for fault in faults)
    assert any("without a day" in fault for fault in faults)


def test_no_file_at_all_is_refused(tmp_path):
    assert "found none" in faults_of(lambda: read_azure_functions(tmp_path))[0]
    assert "found none" in faults_of(lambda: read_azure_functions(tmp_path / "*.csv"))[0]
    assert "No such file" in faults_of(lambda: read_azure_functions(tmp_path / "x.d01.csv"))[0]


def test_the_mapping_is_the_documented_permutation(week):
    read = read_azure_functions(week, services=["x", "y"], top=4, seed=7)
    ranked = ["f3", "f1", "f0", "f2"]
    order = np.random.default_rng(7).permutation(4)
    expected = {ranked[rank]: ["x", "y"][place % 2] for place, rank in enumerate(order)}
    assert {a.function: a.service for a in read.value.assignments} == expected
    sums = {"x": 0, "y": 0}
    for assignment in read.value.assignments:
        sums[assignment.service] += assignment.invocations
    assert dict(zip(read.value.rates.services, read.value.rates.counts().sum(axis=1), strict=True)) == sums
    assert read.value.seed == 7


def test_the_same_seed_maps_alike_and_some_seed_maps_otherwise(week):
    def mapping(seed):
        return read_azure_functions(week, services=["x", "y", "z"], seed=seed).value.assignments

    assert mapping(1) == mapping(1)
    assert len({mapping(seed) for seed in range(8)}) > 1


def test_services_take_the_busiest_functions_only(week):
    read = read_azure_functions(week, services=["x"])
    assert [a.function for a in read.value.assignments] == ["f3"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top": 5}, "at least 5 functions"),
        ({"services": list("abcde")}, "at least 5 functions"),
        ({"services": ["a", "b"], "top": 1}, "at least 2"),
        ({"top": 0}, "at least 1"),
        ({"services": []}, "at least one service"),
        ({"services": ["a", "a"]}, "each once"),
        ({"services": ["a b"]}, "a service name"),
        ({"peak_rps": 0.0}, "a finite rate"),
    ],
)
def test_an_impossible_wish_is_refused(week, options, expected):
    assert expected in faults_of(lambda: read_azure_functions(week, **options))[0]


def test_a_peak_scales_each_service_down_and_none_up(week):
    read = read_azure_functions(week, top=3, peak_rps=0.5)
    assert read.value.rates.counts().max(axis=1).tolist() == [30, 30, 5]
    assert read.value.factors == {"function-01": 0.3, "function-02": 1.0, "function-03": 1.0}


def test_bad_cells_count_as_zero_and_are_shown_with_line_and_minute(tmp_path):
    day_file(tmp_path, 1, row_of("f0", [1, "x", -2, "", "1.5", 6]), row_of("f1", [3]))
    read = read_azure_functions(tmp_path)
    assert read.value.rates.counts()[0, :7].tolist() == [1, 0, 0, 0, 0, 6, 0]
    assert (read.rows, read.rejected) == (2 * 1440, 4)
    assert read.reasons == {"minute: expected a whole number, not negative": 4}
    assert [(fault.line, fault.field, fault.found) for fault in read.first] == [
        (2, "minute[2]", "'x'"),
        (2, "minute[3]", "'-2'"),
        (2, "minute[4]", "''"),
        (2, "minute[5]", "'1.5'"),
    ]


def test_more_bad_cells_than_allowed_are_an_error(tmp_path):
    day_file(tmp_path, 1, row_of("f0", ["x"] * 15))
    assert "15 of 1440 cells rejected" in faults_of(lambda: read_azure_functions(tmp_path))[0]
    assert read_azure_functions(tmp_path, max_rejected_ratio=0.02).rejected == 15


def test_a_row_with_fields_missing_or_a_function_twice_is_rejected_whole(tmp_path):
    rows = [row_of(f"f{i}", [1]) for i in range(200)]
    rows[50] = rows[50].rpartition(",")[0]
    rows.append(row_of("f7", [100]))
    day_file(tmp_path, 1, *rows)
    read = read_azure_functions(tmp_path)
    assert read.rejected == 2 * 1440
    assert sorted(fault.line for fault in read.first) == [52, 202]
    assert read.value.rates.counts().sum() == 199


def test_a_file_cut_short_is_refused(week):
    path = week / "invocations_per_function_md.anon.d02.csv"
    path.write_bytes(path.read_bytes()[:-500])
    assert "cut short" in faults_of(lambda: read_azure_functions(week))[0]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (HEADER.replace("Trigger", "Kind"), "column 4 named 'Kind', expected 'Trigger'"),
        (HEADER.rpartition(",")[0], "1443 columns"),
        (HEADER.replace(",7,", ",8,"), "column 11 named '8', expected '7'"),
    ],
)
def test_another_header_is_refused(tmp_path, header, expected):
    path = day_file(tmp_path, 1, header=header)
    assert expected in faults_of(lambda: read_azure_functions(path))[0]


def test_the_shipped_sample_is_what_its_script_writes(tmp_path):
    script = ROOT / "scripts" / "generate_azure_sample.py"
    subprocess.run([sys.executable, script, "--folder", tmp_path], check=True, capture_output=True)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in SAMPLE.glob("*.csv")}
    assert len(written) == 2
    check = [sys.executable, script, "--check", "--folder", tmp_path]
    assert subprocess.run(check, check=False, capture_output=True).returncode == 0
    next(tmp_path.iterdir()).write_text("damaged")
    assert subprocess.run(check, check=False, capture_output=True).returncode == 1


def test_the_shipped_sample_reads_without_a_fault():
    read = read_azure_functions(SAMPLE)
    assert (read.value.days, read.rejected, read.notes) == ((1, 2), 0, ())
    assert len(read.value.rates.services) == 8
    assert (read.value.rates.counts().sum(axis=1) > 1000).all()


@pytest.mark.skipif(not REAL.is_dir(), reason="the real traces of ../shared/data are not here")
def test_real_days_are_read_whole():
    first = min(REAL.iterdir())
    assert trace_kind(first) == "azure-functions"
    read = read_azure_functions(REAL, services=["detect", "classify", "segment"], top=6, seed=1)
    assert read.value.days == tuple(range(1, 8))
    assert read.rejected == 0
    kept = {a.function for a in read.value.assignments}
    total = 0
    for path in REAL.iterdir():
        for line in path.read_text().splitlines()[1:]:
            cells = line.split(",")
            total += sum(map(int, cells[4:])) if cells[2] in kept else 0
    assert int(read.value.rates.counts().sum()) == total == sum(a.invocations for a in read.value.assignments)
