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
    assert "## Failures\n\nNone." in text
