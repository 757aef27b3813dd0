from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from plans.documents import read_document, write_document
from profiles.document import Profile
from tests.foreplan.workspace import ROOT
from tests.profiles.documents import curve

PROTEUS = "Model,Accel,batchsize,50th_pct,avg_latency(ms)\ntiny,toy,1,4.0,4.2\ntiny,toy,2,6.0,6.1\ntiny,toy,3,,\n"


def foreplan(folder: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "foreplan", "profile", *map(str, arguments)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    return result


def test_a_model_is_measured_and_its_profile_kept(tmp_path: Path) -> None:
    found = foreplan(tmp_path, "run", "bert-tiny-16", "-o", "p", "--batches", "1,2", "--point-seconds", "0.1", "--json")
    (path,) = json.loads(found.stdout)["profiles"]
    profile = read_document(tmp_path / path, Profile)
    assert [row.batch for row in profile.rows] == [1, 2]
    assert profile.rows[0].load_warm_s is not None
    assert profile.rows[0].load_cold_s is None  # its weights are drawn, not read
    assert profile.rows[0].power_w is None
    assert profile.meta.options == {"threads": "1"}
    assert [each.name for each in (tmp_path / "p").iterdir()] == ["bert-tiny-16.cpu.json"]


def test_a_model_that_generates_is_measured_by_phase(tmp_path: Path) -> None:
    grid = ("--batches", "1,2", "--prompt-tokens", "8", "--context-tokens", "16", "--point-seconds", "0.05")
    foreplan(tmp_path, "run", "llama-tiny", "-o", "p", *grid)
    profile = read_document(tmp_path / "p" / "llama-tiny.cpu.json", Profile)
    expected = [(phase, batch, tokens) for phase, tokens in (("decode", 16), ("prefill", 8)) for batch in (1, 2)]
    assert sorted((row.phase, row.batch, row.input_tokens) for row in profile.rows) == expected
    assert profile.kv_bytes_per_token == 2048


def test_input_sizes_are_variants_that_the_registry_and_estimates_know(tmp_path: Path) -> None:
    quick = ("--batches", "1", "--point-seconds", "0.05", "--json")
    found = foreplan(tmp_path, "run", "bert-tiny-16", "-o", "p", "--sequence-tokens", "8,16", *quick)
    assert [Path(path).name for path in json.loads(found.stdout)["profiles"]] == [
        "bert-tiny-16-8.cpu.json",
        "bert-tiny-16.cpu.json",  # its own size
    ]
    assert read_document(tmp_path / "p" / "bert-tiny-16-8.cpu.json", Profile).meta.input == "INT64 8"
    sizes = ("--input-size", "96,160", "--gpu-type", "l4-24gb", "--batches", "1,8")
    foreplan(tmp_path, "estimate", "mobilenet-v2-0.5", "vit-tiny", *sizes, "-o", "p")
    small, large = (read_document(tmp_path / "p" / f"vit-tiny-{size}.l4-24gb.json", Profile) for size in (96, 160))
    assert small.rows[1].latency_s.mean < large.rows[1].latency_s.mean
    assert small.rows[1].peak_bytes < large.rows[1].peak_bytes
    found = foreplan(tmp_path, "estimate", "vit-tiny", *sizes[2:], "--input-size", "100", "-o", "p", code=1)
    assert "vit-tiny-100: input size: found 100, expected 16 to 2048 in steps of 16" in found.stderr


def test_acceleration_that_the_device_lacks_is_refused(tmp_path: Path) -> None:
    found = foreplan(tmp_path, "run", "bert-tiny-16", "-o", "p", "--cuda-graphs", code=1)
    assert "cuda_graphs: found device cpu, expected a CUDA device" in found.stderr


@pytest.mark.slow
def test_copies_and_pairs_are_measured_beside_each_other(tmp_path: Path) -> None:
    grid = ("--batches", "1,2,4", "--point-seconds", "0.1")
    foreplan(tmp_path, "run", "bert-tiny-16", "mobilenet-v2-0.5", "-o", "p", *grid, "--concurrency", "2", "--pairs")
    profile = read_document(tmp_path / "p" / "bert-tiny-16.cpu.json", Profile)
    assert list(profile.interference) == [2]
    assert [each.model for each in profile.neighbours] == ["mobilenet-v2-0.5"]
    (together,) = [row for row in profile.rows if row.concurrency == 2]
    assert together.batch == 2
    assert together.samples >= 10  # five of each


@pytest.mark.slow
def test_copies_of_a_model_measured_by_phase_give_factors_and_no_rows(tmp_path: Path) -> None:
    grid = ("--batches", "1,2", "--prompt-tokens", "8", "--context-tokens", "16", "--point-seconds", "0.05")
    foreplan(tmp_path, "run", "llama-tiny", "-o", "p", *grid, "--concurrency", "2")
    profile = read_document(tmp_path / "p" / "llama-tiny.cpu.json", Profile)
    assert profile.interference[2] >= 1.0
    assert {(row.phase, row.concurrency) for row in profile.rows} == {("prefill", 1), ("decode", 1)}


@pytest.mark.slow
def test_a_pipeline_is_measured_by_stage_beside_what_was_known(tmp_path: Path) -> None:
    grid = ("-o", "p", "--batches", "1,2", "--point-seconds", "0.1")
    foreplan(tmp_path, "run", "bert-tiny-16", *grid)
    foreplan(tmp_path, "run", "bert-tiny-16", *grid, "--pp", "2")
    profile = read_document(tmp_path / "p" / "bert-tiny-16.cpu.json", Profile)
    assert {(row.tp, row.pp) for row in profile.rows} == {(1, 1), (1, 2)}
    staged = next(row for row in profile.rows if row.pp == 2)
    assert all(0 < held_s < staged.latency_s.mean for held_s in staged.stage_latency_s)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--batches", "1,x"), "--batches"),
        (("--concurrency", "1"), "--concurrency"),
        (("--prompt-tokens", "0"), "--prompt-tokens"),
        (("--pairs",), "two models or more"),
    ],
)
def test_wrong_grids_are_refused_before_anything_runs(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    assert said in foreplan(tmp_path, "run", "bert-tiny-16", "-o", "p", *arguments, code=1).stderr
    assert not (tmp_path / "p").exists()


def test_unknown_models_are_named_before_anything_runs(tmp_path: Path) -> None:
    for what in (("run",), ("estimate", "--gpu-type", "l4-24gb")):
        said = foreplan(tmp_path, *what, "bert-tiny-16", "resnet18", "vit-tiny-33", "-o", "p", code=1).stderr
        assert "did you mean resnet-18" in said
        assert "vit-tiny-33: input size: found 33" in said
    assert not (tmp_path / "p").exists()


def test_what_a_command_has_finished_is_not_measured_again_after_it_failed(tmp_path: Path) -> None:
    (tmp_path / "models" / "damaged").mkdir(parents=True)
    (tmp_path / "models" / "damaged" / "config.json").write_text("{}")
    grid = ("--batches", "1", "--point-seconds", "0.05", "--model-dir", "models")
    foreplan(tmp_path, "run", "bert-tiny-16", "damaged", "-o", "p", *grid, code=1)
    before = (tmp_path / "p" / "bert-tiny-16.cpu.json").read_bytes()
    again = foreplan(tmp_path, "run", "bert-tiny-16", "damaged", "-o", "p", *grid, code=1)
    assert "measured already" in again.stderr
    assert "bert-tiny-16 is not in models: measuring the registry's model of that name" in again.stderr
    assert "damaged is not in models" not in again.stderr
    assert (tmp_path / "p" / "bert-tiny-16.cpu.json").read_bytes() == before
    foreplan(tmp_path, "run", "bert-tiny-16", "-o", "p", *grid)  # goes to its end, and leaves nothing behind
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["bert-tiny-16.cpu.json"]


def test_a_model_nobody_measured_is_estimated_and_flagged(tmp_path: Path) -> None:
    found = foreplan(tmp_path, "estimate", "bert-tiny-16", "--gpu-type", "l4-24gb", "-o", "p", "--batches", "1,8")
    assert "modelled, not measured" in found.stderr
    assert "first inference not known" in found.stdout
    profile = read_document(tmp_path / "p" / "bert-tiny-16.l4-24gb.json", Profile)
    assert (profile.source, profile.meta.dtype) == ("modelled", "fp16")
    assert profile.error_ratio is not None
    assert profile.rows[0].latency_s.mean < profile.rows[1].latency_s.mean
    write_document(tmp_path / "p" / "bert-tiny-16.l4-24gb.json", curve({1: 0.1}, model="bert-tiny-16"))
    refused = foreplan(tmp_path, "estimate", "bert-tiny-16", "--gpu-type", "l4-24gb", "-o", "p", code=1)
    assert "was measured, and this one is modelled" in refused.stderr


@pytest.mark.slow
def test_rates_of_this_processor_are_measured_once_and_used_again(tmp_path: Path) -> None:
    foreplan(tmp_path, "calibrate", "-o", "rates.json", "--gpu-type", "my-cpu")
    foreplan(tmp_path, "estimate", "bert-tiny-16", "--rates", "rates.json", "-o", "p", "--batches", "1")
    profile = read_document(tmp_path / "p" / "bert-tiny-16.my-cpu.json", Profile)
    assert profile.meta.options["method"] == "roofline"


def test_held_out_errors_decide_the_exit_code(tmp_path: Path) -> None:
    write_document(tmp_path / "a.json", curve({1: 0.1, 2: 0.2, 4: 0.4}))
    found = json.loads(foreplan(tmp_path, "check", "--profiles", ".", "--json").stdout)
    assert found["passed"]
    assert found["profiles"][0]["points"] == 1
    write_document(tmp_path / "a.json", curve({1: 0.1, 2: 0.3, 4: 0.4}))
    assert "above 3 % (median)" in foreplan(tmp_path, "check", "--profiles", ".", code=1).stderr
    foreplan(tmp_path, "check", "--profiles", ".", "--max-median", "50", "--max-p95", "50")
    write_document(tmp_path / "a.json", curve({1: 0.1, 2: 0.3}))
    assert "three batches" in foreplan(tmp_path, "check", "--profiles", ".", code=1).stderr


def test_an_import_accounts_for_every_row(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(PROTEUS)
    found = json.loads(
        foreplan(tmp_path, "import", "proteus", "p.csv", "-o", "p", "--weights", "10MiB", "--json").stdout
    )
    assert (found["rows"], found["taken"]) == (3, 2)
    assert found["rejected"] == [{"place": "line 4", "reason": "avg_latency(ms) is missing"}]
    assert read_document(tmp_path / "p" / "tiny.toy.json", Profile).rows[0].weight_bytes == (10 * 2**20,)
    refused = foreplan(
        tmp_path, "import", "proteus", "p.csv", "-o", "q", "--weights", "10MiB", "--max-rejected", "10", code=1
    )
    assert "1 of 3" in refused.stderr
    assert not (tmp_path / "q").exists()


def test_files_of_a_tool_add_up_and_never_replace_what_was_measured(tmp_path: Path) -> None:
    lines = PROTEUS.splitlines()[:3]
    for name, line in (("one.csv", lines[1]), ("two.csv", lines[2])):
        (tmp_path / name).write_text(f"{lines[0]}\n{line}\n")
        foreplan(tmp_path, "import", "proteus", name, "-o", "p", "--weights", "10MiB")
    profile = read_document(tmp_path / "p" / "tiny.toy.json", Profile)
    assert sorted(row.batch for row in profile.rows) == [1, 2]
    assert {origin.file for origin in profile.origins} == {"one.csv", "two.csv"}
    write_document(tmp_path / "p" / "tiny.toy.json", curve({1: 0.1}, model="tiny", gpu_type="toy"))
    refused = foreplan(tmp_path, "import", "proteus", "one.csv", "-o", "p", "--weights", "10MiB", code=1)
    assert "tiny on toy: found a profile that was measured" in refused.stderr
    assert read_document(tmp_path / "p" / "tiny.toy.json", Profile).source == "measured"


def test_profiles_are_drawn_and_the_catalogue_is_listed(tmp_path: Path) -> None:
    write_document(tmp_path / "a.json", curve({1: 0.1, 2: 0.2, 4: 0.4}))
    foreplan(tmp_path, "plot", "--profiles", ".", "-o", "page.html")
    assert "plotly" in (tmp_path / "page.html").read_text()[:6_000_000]
    assert "h100-sxm5-80gb" in foreplan(tmp_path, "gpu-types").stdout


def test_accuracy_is_noted_in_the_profile(tmp_path: Path) -> None:
    write_document(tmp_path / "a.json", curve({1: 0.1}, model="bert-tiny-16"))
    (tmp_path / "judge.py").write_text("def judge(model):\n    return len(model.run(model.example(4))['logits']), 8\n")
    foreplan(tmp_path, "accuracy", "bert-tiny-16", "--profiles", ".", "--data", "judge:judge")
    profile = read_document(tmp_path / "a.json", Profile)
    assert [path.name for path in tmp_path.glob("*.json")] == ["a.json"]
    assert profile.accuracy is not None
    assert profile.accuracy.value == 0.5
    refused = foreplan(tmp_path, "accuracy", "bert-tiny-16", "--profiles", ".", code=1)
    assert "either --images with --labels, or --data" in refused.stderr
