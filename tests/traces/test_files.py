import contextlib
import gzip

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plans.errors import InvalidInput
from tests.traces.strategies import rate_traces, request_traces
from traces.files import read_rate_trace, read_request_trace, trace_kind, write_trace
from traces.synthesis import Poisson, synthesise

SUFFIXES = (".parquet", ".csv", ".csv.gz")
GOOD = "arrival_s,service\n" + "".join(f"{i},a\n" for i in range(1000))

# The folder is shared by all examples of a property; each example overwrites its file.
on_files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)


def fault_of(call):
    with pytest.raises(InvalidInput) as caught:
        call()
    return caught.value.faults


def written(tmp_path, text, name="t.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(trace=request_traces())
@on_files
def test_reading_a_written_request_trace_gives_it_back(tmp_path, suffix, trace):
    """Law: read after write is the identity, for every suffix."""
    path = tmp_path / f"trace{suffix}"
    write_trace(path, trace)
    read = read_request_trace(path)
    assert read.value == trace
    assert (read.rows, read.rejected, read.notes) == (len(trace), 0, ())


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(trace=rate_traces())
@on_files
def test_reading_a_written_rate_trace_gives_it_back(tmp_path, suffix, trace):
    """Law: read after write is the identity, for every suffix."""
    path = tmp_path / f"trace{suffix}"
    write_trace(path, trace)
    read = read_rate_trace(path)
    assert read.value == trace
    assert read.notes == ()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_traces_give_equal_bytes(tmp_path, suffix):
    trace = synthesise({"a": Poisson(rate_rps=5)}, duration_s=20, seed=1)
    for name in ("one", "two"):
        write_trace(tmp_path / (name + suffix), trace)
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_a_named_fault(tmp_path, suffix, share):
    path = tmp_path / f"t{suffix}"
    write_trace(path, synthesise({"a": Poisson(rate_rps=50)}, duration_s=20, seed=1))
    whole = path.read_bytes()
    cut = int(len(whole) * share)
    while suffix == ".csv" and cut and b"," in whole[:cut].rpartition(b"\n")[2]:
        cut -= 1  # into the first field of a row
    path.write_bytes(whole[:cut])
    fault = fault_of(lambda: read_request_trace(path))[0]
    assert fault.where == str(path)
    assert fault.remedy


def test_a_csv_cut_within_its_last_value_is_read_with_a_note(tmp_path):
    read = read_request_trace(written(tmp_path, "arrival_s,service\n0.5,alpha\n1.5,al"))
    assert len(read.value) == 2
    assert "may be cut short" in read.notes[0]


def test_a_row_cut_short_at_the_end_is_refused_with_its_line(tmp_path):
    fault = fault_of(lambda: read_request_trace(written(tmp_path, GOOD + "1000.5")))[0]
    assert fault.line == 1002
    assert "cut short" in fault.remedy


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.parquet", b"PAR1 this is no parquet file PAR1"),
        ("t.parquet", b""),
        ("t.csv.gz", b"arrival_s,service\n1,a\n"),
        ("t.csv.gz", gzip.compress(b"arrival_s,service\n" + b"1,a\n" * 1000, mtime=0)[:30] + b"damage"),
        ("t.csv", b""),
        ("t.csv", b"\n\n# window_s=60\n"),
        ("t.csv", b"arrival_s,service\n1,\xff\xfe\n"),
        ("t.csv", b"\xff\xfe\x00a"),
    ],
)
def test_a_damaged_file_is_a_named_fault(tmp_path, name, content):
    path = written(tmp_path, content, name)
    for read in (read_request_trace, read_rate_trace):
        assert fault_of(lambda read=read: read(path))[0].where == str(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_or_a_folder_is_a_named_fault(tmp_path, suffix):
    missing = fault_of(lambda: read_request_trace(tmp_path / f"none{suffix}"))[0]
    assert missing.found == "No such file or directory"
    (tmp_path / f"folder{suffix}").mkdir()
    assert fault_of(lambda: read_request_trace(tmp_path / f"folder{suffix}"))


def test_an_unknown_suffix_is_refused_for_reading_and_writing(tmp_path):
    trace = synthesise({"a": Poisson(rate_rps=5)}, duration_s=2, seed=1)
    for call in (lambda: read_request_trace(tmp_path / "t.json"), lambda: write_trace(tmp_path / "t.json", trace)):
        assert ".parquet, .csv or .csv.gz" in fault_of(call)[0].expected
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_leaves_nothing_behind(tmp_path):
    trace = synthesise({"a": Poisson(rate_rps=5)}, duration_s=2, seed=1)
    assert "folder" in fault_of(lambda: write_trace(tmp_path / "none" / "t.csv", trace))[0].expected
    assert list(tmp_path.iterdir()) == []


def test_rejected_rows_are_counted_by_reason_and_the_first_are_shown_with_their_lines(tmp_path):
    bad = "x,a\n-1,a\n5,\n1,2,3\n7,a b\n8,a\n9\n"
    text = "# made by hand\n" + GOOD + bad
    read = read_request_trace(written(tmp_path, text))
    assert (read.rows, read.rejected, len(read.value)) == (1007, 6, 1001)
    assert sum(read.reasons.values()) == 6
    assert read.reasons["expected 2 fields"] == 2
    assert [fault.line for fault in read.first] == [1003, 1004, 1005, 1006, 1009]


def test_more_rejected_rows_than_allowed_are_an_error_that_shows_some(tmp_path):
    path = written(tmp_path, GOOD + "x,a\n" * 20)
    faults = fault_of(lambda: read_request_trace(path))
    assert faults[0].found == "20 of 1020 rows rejected"
    assert [fault.line for fault in faults[1:]] == [1002, 1003, 1004, 1005, 1006]
    assert read_request_trace(path, max_rejected_ratio=0.02).rejected == 20


def test_no_ratio_at_all_refuses_a_single_bad_row(tmp_path):
    assert fault_of(lambda: read_request_trace(written(tmp_path, GOOD + "x,a\n"), max_rejected_ratio=0.0))


def test_blank_lines_are_no_rows(tmp_path):
    read = read_request_trace(written(tmp_path, "arrival_s,service\n\n1,a\n\n2,b\n\n"))
    assert (read.rows, read.rejected, list(read.value.arrival_s)) == (2, 0, [1.0, 2.0])


def test_rows_out_of_order_are_sorted_and_a_note_says_so(tmp_path):
    read = read_request_trace(written(tmp_path, "arrival_s,service\n2,a\n1,b\n"))
    assert list(read.value.arrival_s) == [1.0, 2.0]
    assert "sorted" in read.notes[0]


@pytest.mark.parametrize("text", ["arrival_s,service\r\n1,a\r\n", "\ufeffarrival_s, service\n1,a\n"])
def test_other_line_ends_and_a_byte_order_mark_are_fine(tmp_path, text):
    assert read_request_trace(written(tmp_path, text)).value.services == ("a",)


def test_wrong_columns_are_named_and_the_other_kind_of_trace_is_recognised(tmp_path):
    path = written(tmp_path, "window_start_s,service,count\n0,a,1\n60,a,2\n")
    faults = fault_of(lambda: read_request_trace(path))
    assert {fault.field for fault in faults} == {"arrival_s", "window_start_s", "count", ""}
    assert faults[-1].found == "a rate trace"
    assert fault_of(lambda: read_rate_trace(written(tmp_path, GOOD)))[-1].found == "a request trace"


def test_a_repeated_column_is_refused(tmp_path):
    path = written(tmp_path, "arrival_s,service,service\n1,a,b\n")
    assert "twice" in fault_of(lambda: read_request_trace(path))[0].found


def test_the_window_of_a_rate_trace_is_inferred_and_a_note_says_so(tmp_path):
    text = "window_start_s,service,count\n0,a,1\n120,a,2\n180,a,2\n"
    read = read_rate_trace(written(tmp_path, text))
    assert read.value.window_s == 60.0
    assert "60 s" in read.notes[0]
    stated = read_rate_trace(written(tmp_path, "# window_s=30\n" + text))
    assert (stated.value.window_s, stated.notes) == (30.0, ())


def test_one_window_of_unstated_length_is_refused_with_the_remedy(tmp_path):
    fault = fault_of(lambda: read_rate_trace(written(tmp_path, "window_start_s,service,count\n0,a,1\n0,b,1\n")))[0]
    assert "# window_s=60" in fault.remedy


@pytest.mark.parametrize("text", ["0", "-60", "nan", "inf", "minute"])
def test_an_impossible_window_in_the_metadata_is_refused(tmp_path, text):
    path = written(tmp_path, f"# window_s={text}\nwindow_start_s,service,count\n0,a,1\n60,a,1\n")
    assert fault_of(lambda: read_rate_trace(path))[0].field == "window_s"


def test_repeated_and_stray_windows_are_rejected_rows(tmp_path):
    rows = "".join(f"{60 * i},a,1\n" for i in range(500)) + "60,a,5\n90,a,1\n"
    read = read_rate_trace(written(tmp_path, "# window_s=60\nwindow_start_s,service,count\n" + rows))
    assert read.rejected == 2
    assert sorted(fault.line for fault in read.first) == [503, 504]
    assert read.value.counts().tolist() == [[1] * 500]


def test_a_stated_duration_before_the_last_request_is_ignored_with_a_note(tmp_path):
    read = read_request_trace(written(tmp_path, "# duration_s=5\narrival_s,service\n1,a\n9,a\n"))
    assert read.value.duration_s == 9.0
    assert "ignored" in read.notes[0]


def test_parquet_of_other_types_is_read_where_they_fit(tmp_path):
    table = pa.table(
        {
            "arrival_s": pa.array([0, 1], pa.int32()),
            "service": pa.array(["a", "b"]).dictionary_encode(),
            "stream": pa.array([7, 8], pa.int8()),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    frame = read_request_trace(tmp_path / "t.parquet").value.frame
    assert frame["arrival_s"].tolist() == [0.0, 1.0]
    assert frame["stream"].tolist() == ["7", "8"]


def test_parquet_columns_of_lists_are_refused(tmp_path):
    pq.write_table(pa.table({"arrival_s": [[1.0]], "service": ["a"]}), tmp_path / "t.parquet")
    fault = fault_of(lambda: read_request_trace(tmp_path / "t.parquet"))[0]
    assert (fault.field, fault.found) == ("arrival_s", "list<element: double>")


def test_bad_rows_of_parquet_are_named_by_row(tmp_path):
    frame = pd.DataFrame({"arrival_s": np.r_[np.arange(999.0), np.nan], "service": "a"})
    frame.to_parquet(tmp_path / "t.parquet")
    read = read_request_trace(tmp_path / "t.parquet")
    assert read.first[0].field == "arrival_s[999]"


@given(st.floats(0, 1e9, allow_subnormal=False))
@on_files
def test_times_survive_csv_to_the_last_bit(tmp_path, value):
    path = written(tmp_path, f"arrival_s,service\n{value!r},a\n")
    assert read_request_trace(path).value.arrival_s[0] == value


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ("arrival_s,service,stream", "requests"),
        ("window_start_s,service,count", "rates"),
        ("HashOwner,HashApp,HashFunction,Trigger,1,2", "azure-functions"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens", "azure-llm"),
    ],
)
def test_the_kind_of_a_trace_is_told_from_its_header(tmp_path, header, kind):
    assert trace_kind(written(tmp_path, f"# x=1\n{header}\n")) == kind
    assert trace_kind(written(tmp_path, gzip.compress(f"{header}\n".encode()), "t.csv.gz")) == kind


def test_a_header_of_no_known_kind_is_refused(tmp_path):
    assert "'when'" in fault_of(lambda: trace_kind(written(tmp_path, "when,what\n")))[0].found


def test_the_kind_of_parquet_is_told_from_its_schema(tmp_path):
    write_trace(tmp_path / "t.parquet", synthesise({"a": Poisson(rate_rps=5)}, duration_s=2, seed=1).rates(1.0))
    assert trace_kind(tmp_path / "t.parquet") == "rates"


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(data=st.data())
@on_files
def test_a_file_with_damaged_bytes_is_read_or_refused_by_name(tmp_path, suffix, data):
    """Law: whatever the bytes, reading gives a trace or InvalidInput."""
    path = tmp_path / f"t{suffix}"
    write_trace(path, synthesise({"a": Poisson(rate_rps=5)}, duration_s=20, seed=1))
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(whole)
    for read in (trace_kind, read_request_trace):
        with contextlib.suppress(InvalidInput):
            read(path)


def test_parquet_text_that_is_no_utf8_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"arrival_s": [1.0], "service": ["abcd"]}), path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"abcd", b"ab\xff\xfe"))
    assert fault_of(lambda: read_request_trace(path))[0].expected == "a whole Parquet file"


def test_a_gzip_cut_before_its_header_ends_has_no_kind(tmp_path):
    path = written(tmp_path, gzip.compress(GOOD.encode())[:15], "t.csv.gz")
    assert "gzip" in fault_of(lambda: trace_kind(path))[0].expected
    assert fault_of(lambda: trace_kind(tmp_path / "none.csv"))


def test_a_service_name_that_is_quoted_over_two_lines_is_a_bad_row(tmp_path):
    read = read_request_trace(written(tmp_path, GOOD + '5,"a\nb"\n'), max_rejected_ratio=0.1)
    assert read.rejected == 1


def test_exactly_the_allowed_ratio_of_bad_rows_is_allowed(tmp_path):
    rows = "".join(f"{i},a\n" for i in range(99)) + "x,a\n"
    assert read_request_trace(written(tmp_path, "arrival_s,service\n" + rows), max_rejected_ratio=0.01).rejected == 1
