from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from executor.controller import Applied, apply
from plans.plan import TokenRules
from tests.executor.peer_process import ROOT, PeerProcess, cluster_of, processes
from tests.executor.placements import placement


def test_a_stock_tritonclient_loads_queries_and_infers_through_the_gateway(tmp_path: Path) -> None:
    agent = PeerProcess("agent", tmp_path / "a", node="a")
    gateway = PeerProcess("gateway", tmp_path / "gateway")
    with processes(agent, gateway):
        wanted = placement({"a/0": {"double": "fake-double"}})
        applied = asyncio.run(apply(wanted, cluster_of(agent), [gateway.address]))
        assert isinstance(applied, Applied)
        probe = subprocess.run(
            [sys.executable, str(ROOT / "tests/executor/triton_probe.py"), gateway.address, "double"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert probe.returncode == 0, probe.stderr
        found = json.loads(probe.stdout)
        assert gateway.stop() == 0
        assert agent.stop() == 0
    assert found["live"]
    assert found["ready"]
    assert found["server"] == "foreplan-gateway"
    assert found["model_ready"]
    assert not found["unknown_ready"]
    assert found["inputs"] == [["x", "FP32", ["-1", "4"]]]
    assert found["outputs"] == ["y"]
    assert found["config"] == ["double", 4, ["x", 11, [4]], False], "11 is TYPE_FP32"
    assert found["index"] == [["double", "READY"]]
    assert found["got"] == [[2 * value for value in row] for row in found["sent"]]
    errors = {name: code for name, (code, _) in found["errors"].items()}
    assert errors == {
        "config": "StatusCode.NOT_FOUND",
        "infer": "StatusCode.NOT_FOUND",
        "load": "StatusCode.FAILED_PRECONDITION",
        "unload": "StatusCode.FAILED_PRECONDITION",
        "wrong_shape": "StatusCode.INVALID_ARGUMENT",
    }
    assert "foreplan apply" in found["errors"]["load"][1]
    assert "double" in found["errors"]["infer"][1]


def test_a_stock_tritonclient_streams_tokens_through_the_gateway(tmp_path: Path) -> None:
    agent = PeerProcess("agent", tmp_path / "a", node="a")
    gateway = PeerProcess("gateway", tmp_path / "gateway")
    with processes(agent, gateway):
        wanted = placement({"a/0": {"chat": "fake-count"}}, tokens=TokenRules(ttft_s=5.0, tpot_s=1.0))
        asyncio.run(apply(wanted, cluster_of(agent), [gateway.address]))
        probe = subprocess.run(
            [sys.executable, str(ROOT / "tests/executor/triton_stream_probe.py"), gateway.address, "chat"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert probe.returncode == 0, probe.stderr
        found = json.loads(probe.stdout)
        assert gateway.stop() == 0
        assert agent.stop() == 0
    assert found["got"] == {"long": [4, 5, 6, 7, 8, 9], "short": [41, 42], "wrong": []}
    assert found["finals"].keys() == {"long", "short"}
    assert {"group", "ttft_s", "tpot_s", "output_tokens"} <= set(found["finals"]["long"])
    (error,) = found["errors"]
    assert "tokens from 0 to 99" in error
    assert found["whole"] == [[8, 9, 10, 11]]
    assert {"ttft_s", "tpot_s", "group", "variant"} <= set(found["told"])
    assert found["inputs"] == [["input_ids", "INT64", ["1", "-1"]]]
