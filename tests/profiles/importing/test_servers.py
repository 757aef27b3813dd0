from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plans.errors import InvalidInput
from profiles.importing import Imported, ImportOptions, import_profiles

PERF = """\
Concurrency,Inferences/Second,Client Send,Server Queue,p50 latency,p90 latency,p95 latency,p99 latency,Avg latency,Avg GPU Power Usage,Max GPU Memory Usage
1,200.0,10,20,4800,5200,5300,6000,5000,GPU-a:150.5;,GPU-a:2000000000;
4,400.0,10,20,9000,11000,12000,14000,,GPU-a:250.0;GPU-b:50.0;,GPU-a:2100000000;GPU-b:0;
"""  # noqa: E501 - as the tool writes it


def run(tmp_path: Path, kind: str, content: Any, name: str, **options: Any) -> Imported:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return import_profiles(kind, path, ImportOptions(**{"model": "toy", "gpu_type": "a10", **options}))


def test_perf_analyzer_rows_differ_in_concurrency(tmp_path: Path) -> None:
    (profile,) = run(tmp_path, "perf-analyzer", PERF, "p.csv", batch=2).profiles
    one, four = profile.rows
    assert (one.concurrency, one.batch, one.latency_s.mean) == (1, 2, pytest.approx(0.005))
    assert four.latency_s.mean == pytest.approx(4 * 2 / 400)
    assert four.latency_s.p99 == pytest.approx(0.014)
    assert (one.power_w, four.power_w) == (150.5, 300.0)
    assert (one.peak_bytes, four.peak_bytes) == ((2_000_000_000,), (2_100_000_000,))


def test_an_open_loop_run_is_no_latency_of_a_batch(tmp_path: Path) -> None:
    text = PERF.replace("Concurrency", "Request Rate")
    with pytest.raises(InvalidInput, match="2 x an open-loop run"):
        run(tmp_path, "perf-analyzer", text, "p.csv", weight_bytes=1)


def test_perf_analyzer_export_counts_from_request_to_last_response(tmp_path: Path) -> None:
    requests = [
        {"timestamp": 1000 * n, "response_timestamps": [1000 * n + 3_000_000, 1000 * n + 5_000_000]} for n in range(20)
    ]
    export = {
        "experiments": [
            {"experiment": {"mode": "concurrency", "value": 2}, "requests": [*requests, {"timestamp": 5}]},
            {"experiment": {"mode": "request_rate", "value": 20}, "requests": requests},
            {"experiment": {"mode": "concurrency", "value": 3}, "requests": []},
        ],
        "version": "2.50.0",
    }
    imported = run(tmp_path, "perf-analyzer", export, "p.json", weight_bytes=1)
    (row,) = imported.profiles[0].rows
    assert (row.concurrency, row.samples, row.latency_s.mean) == (2, 20, pytest.approx(0.005))
    assert imported.profiles[0].origins[0].tool_version == "2.50.0"
    assert sorted(imported.reasons) == ["an open-loop run: its latency holds waiting", "no request was answered"]


SUMMARY = """\
================================================
MLPerf Results Summary
================================================
SUT name : toy-a10
Scenario : SingleStream
Mode     : PerformanceOnly
90th percentile latency (ns) : 6000000
Result is : VALID

Mean latency (ns)               : 5000000
50.00 percentile latency (ns)   : 4900000
95.00 percentile latency (ns)   : 6100000
99.00 percentile latency (ns)   : 7000000
"""


def test_an_mlperf_summary_is_one_row(tmp_path: Path) -> None:
    imported = run(tmp_path, "mlperf", SUMMARY, "mlperf_log_summary.txt", weight_bytes=1, gpu_type=None)
    (profile,) = imported.profiles
    assert profile.gpu_type == "toy-a10"
    assert profile.rows[0].latency_s.mean == pytest.approx(0.005)
    assert profile.rows[0].latency_s.p99 == pytest.approx(0.007)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [("VALID", "INVALID", "not VALID"), ("SingleStream", "Offline", "scenario Offline"), (": 5000000", ": x", "Mean")],
)
def test_an_mlperf_summary_that_says_nothing_about_a_batch_is_refused(
    tmp_path: Path, old: str, new: str, reason: str
) -> None:
    with pytest.raises(InvalidInput, match=reason):
        run(tmp_path, "mlperf", SUMMARY.replace(old, new), "s.txt", weight_bytes=1)


RESULTS = """\
Organization,Model,Scenario,Result,Units,accelerator_model_name,version
Toy,resnet,SingleStream,0.5,Latency (ms),NVIDIA A10,v4.1
Toy,resnet,MultiStream,2.0,Latency (ms),NVIDIA A10,v4.1
Toy,resnet,Offline,9000,Samples/s,NVIDIA A10,v4.1
"""


def test_published_mlperf_results_keep_what_has_a_latency(tmp_path: Path) -> None:
    imported = run(tmp_path, "mlperf", RESULTS, "r.csv", weight_bytes=1, model=None, gpu_type=None)
    (profile,) = imported.profiles
    assert (profile.model, profile.gpu_type) == ("resnet", "NVIDIA-A10")
    assert [(row.batch, row.latency_s.mean) for row in profile.rows] == [(1, 0.0005), (8, 0.002)]
    assert profile.origins[0].statistic == "p90"
    assert (imported.taken, len(imported.rejected)) == (2, 1)
