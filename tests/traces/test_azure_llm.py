from pathlib import Path

import pytest

from plans.errors import InvalidInput
from traces.azure_llm import read_azure_llm

DATA = Path(__file__).parents[3] / "shared" / "data"
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def written(tmp_path, text):
    path = tmp_path / "llm.csv"
    path.write_text(text)
    return path


def test_seven_decimals_and_offsets_are_read_and_the_first_request_is_time_zero(tmp_path):
    rows = "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
    trace = read_azure_llm(written(tmp_path, HEADER + rows), service="code").value
    assert trace.arrival_s.tolist() == [0.0, 0.052]
    assert trace.numbers("input_tokens").tolist() == [4808, 3180]
    assert trace.numbers("output_tokens").tolist() == [10, 8]
    assert trace.services == ("code",)
    offset = "2024-05-10 00:00:00.009930+00:00,1,2\n2024-05-10 02:00:01.009930+02:00,3,4\n"
    assert read_azure_llm(written(tmp_path, HEADER + offset)).value.arrival_s.tolist() == [0.0, 1.0]


def test_bad_rows_are_counted_and_never_lost_silently(tmp_path):
    good = "".join(f"2023-11-16 18:17:0{i % 10}.5,10,{i}\n" for i in range(500))
    bad = "16 Nov 2023,1,2\n2023-11-16 18:17:04,x,2\n2023-11-16 18:17:04,1,-2\n2023-11-16 18:17:04,1\n"
    read = read_azure_llm(written(tmp_path, HEADER + good + bad))
    assert (read.rows, read.rejected, len(read.value)) == (504, 4, 500)
    assert [fault.line for fault in read.first] == [502, 503, 504, 505]


def test_a_file_whose_every_row_is_bad_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="2 of 2 rows rejected"):
        read_azure_llm(written(tmp_path, HEADER + "1,1,1\nnow,2,2\n"))


def test_other_columns_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="GeneratedTokens"):
        read_azure_llm(written(tmp_path, "TIMESTAMP,ContextTokens\n2023-11-16 18:17:04,1\n"))


@pytest.mark.parametrize(("kind", "rows"), [("code", 8819), ("conv", 19366)])
@pytest.mark.skipif(not DATA.is_dir(), reason="the real traces of ../shared/data are not here")
def test_no_row_of_the_real_traces_is_lost(kind, rows):
    read = read_azure_llm(DATA / f"AzureLLMInferenceTrace_{kind}.csv")
    assert (read.rows, read.rejected, len(read.value)) == (rows, 0, rows)
    assert 3400 < read.value.duration_s < 3600
