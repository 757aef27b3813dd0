from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from profiles.document import Row
from profiles.importing import Imported, ImportOptions, import_profiles

AIC = """\
model,isl,osl,prefix,concurrency,request_rate,bs,ttft,tpot,request_latency,tp,pp,memory,gemm,backend,version,system,power_w
toy/llama,1000,100,0,1,0.5,1,50.0,10.0,1040.0,2,1,40.5,fp8,trtllm,1.0,h200_sxm,500
toy/llama,1000,100,0,8,0.5,8,200.0,15.0,1685.0,2,1,50.5,fp8,trtllm,1.0,h200_sxm,600
toy/llama,1000,100,0,8,0.5,8,200.0,,1685.0,2,1,50.5,fp8,trtllm,1.0,h200_sxm,
"""

DISAGGREGATED = """\
model,isl,osl,ttft,tpot,(p)tp,(p)pp,(p)bs,(p)memory,(p)system,(d)tp,(d)pp,(d)bs,(d)memory,(d)system
llama,1000,100,50.0,10.0,1,1,2,30,h200_sxm,4,1,64,20,h200_sxm
"""

ROW = {
    "model_id": "toy/llama",
    "completed": 100,
    "failed": 0,
    "total_input_tokens": 50000,
    "total_output_tokens": 10000,
    "output_throughput": 800.0,
    "mean_ttft_ms": 60.0,
    "median_ttft_ms": 55.0,
    "p99_ttft_ms": 90.0,
    "mean_tpot_ms": 20.0,
    "median_tpot_ms": 19.0,
    "p99_tpot_ms": 30.0,
}


def rows(imported: Imported, phase: str) -> list[Row]:
    (profile,) = imported.profiles
    return [row for row in profile.rows if row.phase == phase]


def run(tmp_path: Path, kind: str, content: Any, name: str = "f.json", **options: Any) -> Imported:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return import_profiles(kind, path, ImportOptions(**options))


def test_aiconfigurator_gives_whole_requests_and_phases(tmp_path: Path) -> None:
    imported = run(tmp_path, "aiconfigurator", AIC, "aic.csv")
    assert (imported.rows, imported.taken) == (3, 2)
    assert imported.reasons == {"tpot is missing": 1}
    (profile,) = imported.profiles
    assert (profile.model, profile.gpu_type, profile.source) == ("llama", "h200_sxm", "modelled")
    assert profile.meta.dtype == "fp8"
    assert [row.batch for row in rows(imported, "whole")] == [1, 8]
    decode = rows(imported, "decode")[1]
    assert (decode.batch, decode.input_tokens, decode.tp) == (8, 1050, 2)
    assert decode.latency_s.mean == pytest.approx(0.015)
    assert decode.peak_bytes == (50_500_000_000,)
    assert decode.power_w == 600
    (prefill,) = rows(imported, "prefill")
    assert (prefill.batch, prefill.latency_s.mean) == (1, pytest.approx(0.05))


def test_aiconfigurator_disaggregated_rows_give_both_pools(tmp_path: Path) -> None:
    imported = run(tmp_path, "aiconfigurator", DISAGGREGATED, "aic.csv")
    (prefill,), (decode,) = rows(imported, "prefill"), rows(imported, "decode")
    assert (prefill.tp, prefill.batch, prefill.peak_bytes) == (1, 2, (30_000_000_000,))
    assert (decode.tp, decode.batch, decode.input_tokens) == (4, 64, 1050)


def test_vllm_running_sequences_follow_from_littles_law(tmp_path: Path) -> None:
    options = {"gpu_type": "h100", "weight_bytes": 10**9}
    imported = run(tmp_path, "vllm", [ROW, {**ROW, "output_throughput": 2000.0, "max_concurrency": 40}], **options)
    first, second = rows(imported, "decode")
    assert (first.batch, second.batch) == (16, 40)
    assert first.input_tokens == 550
    assert first.latency_s.p50 == pytest.approx(0.019)
    assert first.latency_s.p99 == pytest.approx(0.030)
    assert not rows(imported, "prefill")
    assert any("hold waiting" in note for note in imported.notes)


def test_vllm_with_one_request_at_a_time_gives_the_prefill(tmp_path: Path) -> None:
    alone = {**ROW, "output_throughput": 48.0, "max_concurrency": 1, "failed": 3}
    imported = run(tmp_path, "vllm", alone, gpu_type="h100", weight_bytes=10**9)
    (prefill,) = rows(imported, "prefill")
    assert (prefill.batch, prefill.input_tokens, prefill.latency_s.mean) == (1, 500, pytest.approx(0.06))
    assert any("3 requests failed" in note for note in imported.notes)


GENAI = """\
Metric,avg,min,max,p99,p95,p90,p75,p50,p25
Time To First Token (ms),60.0,40,90,88,80,75,65,58,50
Inter Token Latency (ms),20.0,15,40,35,30,25,22,19,17
Output Sequence Length (tokens),"1,00",90,110,109,108,105,102,100,98
Input Sequence Length (tokens),500,500,500,500,500,500,500,500,500

Metric,Value
Output Token Throughput (per sec),800.0
Request Throughput (per sec),8.0
Request Count (count),100
"""


def test_genai_perf_csv_is_read_from_both_blocks(tmp_path: Path) -> None:
    imported = run(tmp_path, "genai-perf", GENAI, "g.csv", model="toy", gpu_type="h100", weight_bytes=1)
    (decode,) = rows(imported, "decode")
    assert (decode.batch, decode.input_tokens) == (16, 550)
    assert decode.latency_s.p95 == pytest.approx(0.030)


AIPERF = {
    "input_config": {"endpoint": {"model_names": ["toy/llama"]}, "loadgen": {"concurrency": 1}},
    "time_to_first_token": {"unit": "ms", "avg": 60.0, "p50": 58.0},
    "inter_token_latency": {"unit": "ms", "avg": 20.0, "p50": 19.0, "p99": 35.0},
    "input_sequence_length": {"unit": "tokens", "avg": 500.0},
    "output_sequence_length": {"unit": "tokens", "avg": 100.0},
    "output_token_throughput": {"unit": "tokens/sec", "avg": 48.0},
}


def test_aiperf_leaves_out_what_was_not_set(tmp_path: Path) -> None:
    imported = run(tmp_path, "aiperf", AIPERF, gpu_type="h100", weight_bytes=1)
    (profile,) = imported.profiles
    assert profile.model == "llama"
    (decode,), (prefill,) = rows(imported, "decode"), rows(imported, "prefill")
    assert decode.latency_s.p95 is None
    assert (decode.batch, prefill.latency_s.mean) == (1, pytest.approx(0.06))
