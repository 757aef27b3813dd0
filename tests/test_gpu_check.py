"""``scripts/gpu_check``: its arithmetic here, the whole of it on the CPU when slow tests run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.runtime.registry import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check"


def load_script() -> ModuleType:
    loader = SourceFileLoader("gpu_check", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # its dataclasses look themselves up
    loader.exec_module(module)
    return module


gpu_check = load_script()


@pytest.mark.parametrize("scale", [gpu_check.FULL, gpu_check.QUICK])
def test_it_serves_five_services_of_models_that_it_profiles(scale):
    assert len(scale.services) == 5
    assert set(scale.services.values()) <= set(scale.models)
    assert {*scale.models, *scale.llamas} <= set(REGISTRY)


def test_a_device_becomes_a_name_that_documents_take():
    assert gpu_check.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@given(
    latencies=st.lists(st.floats(1e-4, 2.0), min_size=5, max_size=5),
    busy=st.floats(0.05, 1.0),
)
def test_deadlines_leave_time_for_the_slowest_and_rates_keep_the_device_busy_for_its_share(latencies, busy):
    services = {f"s{n}": f"m{n}" for n in range(5)}
    latency_s = {f"m{n}": each for n, each in enumerate(latencies)}
    chosen = gpu_check.deadlines_and_rates(services, latency_s, busy)
    used = sum(chosen[name][1] * latency_s[model] for name, model in services.items())
    total_rps = sum(rate for _, rate in chosen.values())
    assert used == pytest.approx(busy) or (used < busy and total_rps == pytest.approx(gpu_check.MOST_RPS))
    assert total_rps <= gpu_check.MOST_RPS * (1 + 1e-9)
    assert min(deadline for deadline, _ in chosen.values()) >= 4 * max(latencies)


def results(predicted, simulated, measured):
    def one(attainment):
        return {"service": "a", "attainment": attainment, "offered": 7, "mean_batch": None}

    found = {"plan": {"predicted": [one(predicted)]}, "overhead_s": 0.001}
    return found | {"simulated": {"services": [one(simulated)]}, "measured": {"services": [one(measured)]}}


@pytest.mark.parametrize(
    ("told", "worst"),
    [((1.0, 0.9, 0.98), 8.0), ((0.9, 1.0, 1.0), 10.0), ((None, 1.0, 0.5), 50.0), ((1.0, 1.0, None), None)],
)
def test_the_worst_distance_from_what_was_measured_is_stated(told, worst):
    found = gpu_check.worst_points(gpu_check.attainments(results(*told)))
    assert found == (worst if worst is None else pytest.approx(worst))


def test_a_run_without_results_is_reported_with_its_failures(tmp_path):
    log = gpu_check.Log()
    assert log.try_run("foreplan", "no-such-command") is None
    options = gpu_check.parsed(["--device", "cpu", "--profiles", str(tmp_path)])
    options.gpu_type = "cpu"
    text = gpu_check.report(log, {"date": "today"}, options, None)
    assert "- date: today" in text
    assert "Not done" in text
    assert "- `foreplan no-such-command` ended with exit code" in text
    told = gpu_check.report(gpu_check.Log(), {}, options, results(1.0, 0.9, 0.98))
    assert "| a | 7 | - | 100.0% | 90.0% | 98.0% |" in told
    assert "8.0 points at most" in told


class Recording(gpu_check.Log):  # type: ignore[misc, name-defined]
    """Runs nothing: it writes down what it would, and the document that a profile run leaves."""

    def run(self, *arguments, limit_s=0.0):
        words = [str(word) for word in arguments]
        self.commands.append((" ".join(words), 0.0, 0))
        if words[:3] == ["foreplan", "profile", "run"]:
            folder, model, kind = words[words.index("-o") + 1], words[3], words[words.index("--gpu-type") + 1]
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / f"{model}.{kind}.json").touch()
        return ""


def full_options(tmp_path, *more):
    options = gpu_check.parsed(["--profiles", str(tmp_path / "p"), "--gpu-type", "h100", *more])
    options.output = tmp_path
    return options


def profiled(log):
    words = [command.split() for command, _, _ in log.commands if "profile run" in command]
    return [(each[3], each[each.index("--dtype") + 1], "--concurrency" in each) for each in words]


def test_what_serves_is_profiled_first_with_copies_then_llama_then_all_the_rest_once(tmp_path, monkeypatch):
    log, options = Recording(), full_options(tmp_path)
    monkeypatch.setattr(gpu_check, "whole_path", lambda *_: log.commands.append(("PATH", 0.0, 0)) or {"plan": {}})
    assert gpu_check.path_results(log, gpu_check.FULL, options, 10**11) == {"plan": {}}
    gpu_check.profile_the_rest(log, gpu_check.FULL, options, 10**11)
    serving = list(gpu_check.FULL_SERVICES.values())
    assert [command for command, _, _ in log.commands].index("PATH") == len(serving)
    done = profiled(log)
    assert done[: len(serving)] == [(model, "fp16", True) for model in serving]
    assert done[len(serving) :][:2] == [("llama-1b", "bf16", False), ("llama-8b", "bf16", False)]
    assert len(done) == len(set(done)) == 2 * len(gpu_check.FULL_MODELS) + 2
    assert {model for model, dtype, _ in done if dtype == "fp16"} == set(gpu_check.FULL_MODELS)


def test_what_an_earlier_run_did_is_kept_if_so_asked(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(gpu_check, "whole_path", lambda *_: calls.append(1) or {"plan": {}})
    for more in ((), ("--keep",), ("--keep",), ()):
        log, options = Recording(), full_options(tmp_path, *more)
        gpu_check.run_tests(log, options)
        assert gpu_check.path_results(log, gpu_check.QUICK, options, 10**11) == {"plan": {}}
        gpu_check.profile_the_rest(log, gpu_check.QUICK, options, 10**11)
        assert bool(log.commands) is not options.keep
    assert len(calls) == 2


def test_what_the_time_or_the_memory_does_not_suffice_for_is_named(tmp_path):
    log, options = Recording(ends_s=0.0), full_options(tmp_path)
    assert gpu_check.path_results(log, gpu_check.FULL, options, 10**10) is None
    gpu_check.profile_the_rest(log, gpu_check.FULL, options, 10**10)
    assert log.commands == []
    assert "the whole path: the time was over" in log.left_out
    assert "profile of llama-8b: it needs 30 GB, the device has less" in log.left_out
    assert any("NCCL" in each for each in log.left_out)
    text = gpu_check.report(log, {}, options, None)
    assert "## Failures\n\nNone.\n\n## Not done\n\n- profile of resnet-50 in fp16" in text


def test_a_command_that_takes_too_long_is_ended_and_kept_as_a_failure():
    log = gpu_check.Log()
    with pytest.raises(subprocess.TimeoutExpired):
        log.run("timeit", "-n", "1", "-r", "1", "while True: pass", limit_s=0.5)
    assert log.commands[0][2] == 124
    assert "took more than" in log.failures[0]


@pytest.mark.slow
def test_the_whole_path_runs_on_the_processor(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--profiles", str(tmp_path / "profiles")], capture_output=True, text=True, timeout=1200, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| llama-tiny | decode | 32 |" in text
    assert all(f"| {service} | " in text for service in gpu_check.QUICK.services)
    assert "## Failures\n\nNone.\n\n## Not done\n\nNothing." in text
