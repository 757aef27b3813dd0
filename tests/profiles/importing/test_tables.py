from __future__ import annotations

import json
from pathlib import Path

import pytest

from plans.errors import InvalidInput
from profiles.importing import ImportOptions, import_profiles
from profiles.latency import LatencyModel

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the data sets beside the project are not here")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


PROTEUS = """\
Model,Accel,Trials,batchsize,50th_pct,90th_pct,avg_latency(ms),Min,Max,Accuracy,Normalized_Accuracy
tiny,toy_gpu,100,1,4.0,5.0,4.2,3.9,9.0,70.5,90.0
tiny,toy_gpu,100,2,6.0,7.0,6.1,5.9,9.0,70.5,90.0
tiny,toy_cpu,,1,40.0,50.0,44.0,39.0,90.0,70.5,90.0
tiny,toy_gpu,100,1,4.1,5.0,4.2,3.9,9.0,70.5,90.0
tiny,toy_gpu,100,4,,,,,,70.5,90.0
"""


def test_proteus_gives_a_profile_per_model_and_accelerator(tmp_path: Path) -> None:
    imported = import_profiles("proteus", write(tmp_path / "p.csv", PROTEUS), ImportOptions(weight_bytes=10**6))
    assert (imported.rows, imported.taken) == (5, 3)
    assert {each.place: each.reason for each in imported.rejected} == {
        "line 5": "it repeats an earlier row",
        "line 6": "avg_latency(ms) is missing",
    }
    gpu, cpu = imported.profiles
    assert (gpu.gpu_type, cpu.gpu_type) == ("toy_gpu", "toy_cpu")
    assert gpu.rows[1].latency_s.mean == pytest.approx(0.0061)
    assert gpu.rows[1].latency_s.p50 == pytest.approx(0.006)
    assert gpu.rows[0].samples == 100
    assert cpu.rows[0].samples == 0
    assert gpu.accuracy is not None
    assert gpu.accuracy.value == pytest.approx(0.705)
    assert any("peak memory is not stated" in note for note in imported.notes)


@needs_data
def test_proteus_as_published_is_read_whole() -> None:
    imported = import_profiles("proteus", DATA / "proteus_profiled.csv", ImportOptions(weight_bytes=10**9))
    assert imported.rows == 651
    assert imported.taken + len(imported.rejected) == 651
    assert imported.taken > 600
    assert len({profile.gpu_type for profile in imported.profiles}) == 3


ALPASERVE = {
    "note": "toy",
    "models": {
        "toy-1b": {
            "configs": [
                {"dp": 1, "op": 1, "pp": 1, "weight_mem_bytes": [1000], "latency_s": {"1": [0.1], "2": [0.19]}},
                {"dp": 1, "op": 2, "pp": 2, "weight_mem_bytes": [250, 260], "latency_s": {"1": [0.04, 0.05]}},
                {"dp": 2, "op": 1, "pp": 1, "weight_mem_bytes": [1000], "latency_s": {"1": [0.1]}},
            ]
        }
    },
}


def test_alpaserve_tables_keep_their_stages(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(ALPASERVE))
    imported = import_profiles("alpaserve", path, ImportOptions(gpu_type="v100"))
    assert (imported.rows, imported.taken) == (4, 3)
    assert list(imported.reasons) == ["data parallelism is no property of a profile"]
    (profile,) = imported.profiles
    model = LatencyModel(profile, 2, 2)
    assert model.at(1).stage_s == pytest.approx((0.04, 0.05))
    assert model.weight_bytes == (250, 260)


@needs_data
def test_alpaserve_tables_as_generated_are_read_whole() -> None:
    imported = import_profiles("alpaserve", DATA / "alpaserve_cases" / "profiles.json", ImportOptions(gpu_type="v100"))
    assert not imported.rejected
    assert {profile.model for profile in imported.profiles} >= {"bert-1.3b", "bert-6.7b", "moe-5.3b"}


MELANGE = {
    "workload_distribution": [[0.5, 0.5], [0.0, 0.0]],
    "gpu_info": {"toy": {"cost": 1.0, "tputs": [[10.0, 4.0], [5.0, 0.0]]}},
    "total_request_rate": 1.0,
    "slice_factor": 1,
}


def test_melange_throughput_becomes_capacity(tmp_path: Path) -> None:
    path = write(tmp_path / "m.json", json.dumps(MELANGE))
    options = ImportOptions(model="toy", weight_bytes=1, input_buckets=(100, 500), output_buckets=(50, 200))
    imported = import_profiles("melange", path, options)
    assert list(imported.reasons) == ["throughput is not above 0"]
    (profile,) = imported.profiles
    assert profile.source == "modelled"
    assert LatencyModel(profile, 1, 1, 100, 200).at(1).mean_s == pytest.approx(0.25)


def test_melange_buckets_must_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.json", json.dumps(MELANGE))
    with pytest.raises(InvalidInput, match="--input-buckets"):
        import_profiles("melange", path, ImportOptions(model="toy", weight_bytes=1))


VIDUR = """\
time_stats.emb.mean,time_stats.mlp_up_proj.mean,time_stats.mlp_down_proj.mean,time_stats.mlp_down_proj.min,num_tokens,num_tensor_parallel_workers
0.5,0.1,0.2,0.1,64,1
0.5,0.1,0.1,0.1,64,2
0.6,0.2,0.4,0.1,128,1
"""


def test_vidur_layers_add_up_and_attention_is_said_to_be_missing(tmp_path: Path) -> None:
    options = ImportOptions(model="toy", gpu_type="a100", weight_bytes=1, layers=10)
    imported = import_profiles("vidur", write(tmp_path / "mlp.csv", VIDUR), options)
    (profile,) = imported.profiles
    assert LatencyModel(profile, 1, 1, 64, phase="prefill").at(1).mean_s == pytest.approx(0.0035)
    assert LatencyModel(profile, 2, 1, 64, phase="prefill").at(1).mean_s == pytest.approx(0.0025)
    assert any("attention" in note for note in imported.notes)
    with pytest.raises(InvalidInput, match="--layers"):
        import_profiles("vidur", tmp_path / "mlp.csv", ImportOptions(model="toy", gpu_type="a100", weight_bytes=1))
