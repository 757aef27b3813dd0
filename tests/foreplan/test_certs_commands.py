from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from foreplan.cli.app import app


def foreplan(*arguments: object) -> Any:
    """Run the command in this process; a server's log, which it would leave behind, goes nowhere after it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        return CliRunner().invoke(app, [str(one) for one in arguments])
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def test_an_authority_is_made_and_issues_and_rotates(tmp_path: Path) -> None:
    assert foreplan("certs", "init", tmp_path / "ca").exit_code == 0
    issued = foreplan("certs", "issue", tmp_path / "ca", "node-a", "--role", "agent", "--host", "10.0.0.1", "--json")
    assert issued.exit_code == 0, issued.output
    (one,) = json.loads(issued.stdout)["certificates"]
    assert (one["name"], one["role"], one["hosts"]) == ("node-a", "agent", ["10.0.0.1"])
    before = (tmp_path / "ca" / "node-a-key.pem").read_bytes()
    assert foreplan("certs", "rotate", tmp_path / "ca").exit_code == 0
    assert (tmp_path / "ca" / "node-a-key.pem").read_bytes() != before
    assert "copy ca.pem" in foreplan("certs", "rotate", tmp_path / "ca", "--ca").stderr
    refused = foreplan("certs", "rotate", tmp_path / "ca", "node-a", "--ca")
    assert refused.exit_code == 1
    assert "no names with --ca" in refused.stderr


def test_a_role_that_is_none_is_refused(tmp_path: Path) -> None:
    foreplan("certs", "init", tmp_path)
    refused = foreplan("certs", "issue", tmp_path, "x", "--role", "king")
    assert refused.exit_code == 1
    assert "operator, gateway, agent, client" in refused.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--gateway", "10.0.0.1:8001"], "certs init"),
        (["--gateway", "127.0.0.1:1", "--grpc-client-cert", "x.pem"], "--grpc-client-key"),
        (["--gateway", "127.0.0.1:1", "--timeout", "stage=soon"], "STEP=SECONDS"),
        (["--gateway", "127.0.0.1:1", "--timeout", "routes=2"], "seconds above 4"),
        (["--gateway", "127.0.0.1:1", "--target", "nobody"], "--target"),
    ],
)
def test_apply_refuses_what_it_cannot_do_safely(tmp_path: Path, options: list[str], named: str) -> None:
    from plans.documents import write_document, write_text
    from tests.executor.placements import placement

    write_document(tmp_path / "plan.json", placement({}))
    node = '- {name: a, address: "127.0.0.1:1", gpus: {type: cpu, count: 1}}'
    write_text(tmp_path / "cluster.yaml", f"gpu_types: {{cpu: {{memory: 1GiB}}}}\nnodes:\n  {node}\n")
    refused = foreplan("apply", tmp_path / "plan.json", "--cluster", tmp_path / "cluster.yaml", *options)
    assert refused.exit_code == 1
    assert named in refused.stderr


def test_addresses_off_loopback_are_told_by_what_gave_them(tmp_path: Path) -> None:
    from plans.documents import write_text

    nodes = "".join(
        f'  - {{name: n{i}, address: "10.0.0.{i}:7001", gpus: {{type: cpu, count: 1}}}}\n' for i in range(1, 4)
    )
    cluster = tmp_path / "cluster.yaml"
    write_text(cluster, f"gpu_types: {{cpu: {{memory: 1GiB}}}}\nnodes:\n{nodes}")
    refused = foreplan("status", "--cluster", cluster, "--gateway", "127.0.0.1:1", "--gateway", "gate.lan:8001")
    assert refused.exit_code == 1
    assert f"{cluster}: nodes: found 10.0.0.1:7001 and 2 more, expected certificates" in refused.stderr
    assert "--gateway: found gate.lan:8001, expected certificates" in refused.stderr
    assert "--grpc-client-cert" in refused.stderr


def test_servers_off_loopback_need_certificates(tmp_path: Path) -> None:
    refused = foreplan("gateway", "--listen", "0.0.0.0:0", "--state-dir", tmp_path)
    assert refused.exit_code == 1
    assert "--insecure" in refused.stderr


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (["--device", "tpu"], 1, "--device: found 'tpu', expected cpu, cuda or cuda:INDEX"),
        (["--device", "cuda"], 1, "--device: found cuda, without a driver for CUDA, expected a machine with a GPU"),
        (["--device", "cuda:1"], 1, "--device: found cuda:1, without a driver for CUDA"),
        (["--dtype", "int8"], 2, "--dtype"),
        (["--model-dir", "nowhere"], 1, "--model-dir: found nowhere (no such folder)"),
        (["--cuda-graphs"], 1, "--cuda-graphs: found --device cpu"),
        (["--runtime", "nowhere"], 1, "--runtime: found 'nowhere'"),
        (["--runtime", "nowhere.at_all:Runtime"], 1, "--runtime: found 'nowhere.at_all:Runtime'"),
        (["--swap"], 1, "--swap"),
    ],
)
def test_an_agent_that_could_never_load_a_model_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int, named: str
) -> None:
    from foreplan.cli import server_commands
    from plans.documents import write_text

    monkeypatch.setattr(server_commands, "_has_cuda_driver", lambda: False)

    node = '- {name: a, address: "10.0.0.1:1", gpus: {type: cpu, count: 1}}'  # refused too, if all else were right
    write_text(tmp_path / "cluster.yaml", f"gpu_types: {{cpu: {{memory: 1GiB}}}}\nnodes:\n  {node}\n")
    flags = ["--cluster", tmp_path / "cluster.yaml", "--node", "a", "--state-dir", tmp_path / "state"]
    refused = foreplan("agent", *flags, *options)
    assert (refused.exit_code, refused.stdout) == (code, "")
    assert named in refused.stderr


@pytest.mark.parametrize("name", ["nowhere", "cluster.yaml"])
def test_a_rollback_names_a_store_that_is_none(tmp_path: Path, name: str) -> None:
    from plans.documents import write_text

    node = '- {name: a, address: "127.0.0.1:1", gpus: {type: cpu, count: 1}}'
    write_text(tmp_path / "cluster.yaml", f"gpu_types: {{cpu: {{memory: 1GiB}}}}\nnodes:\n  {node}\n")
    where = ["--cluster", tmp_path / "cluster.yaml", "--gateway", "127.0.0.1:1", "--store", tmp_path / name]
    refused = foreplan("rollback", *where)
    assert refused.exit_code == 1
    assert "folder, expected a plan store; give the --store that plans were applied with" in refused.stderr


def test_an_apply_names_a_store_with_a_damaged_record_before_it_asks_anybody(tmp_path: Path) -> None:
    from plans.documents import write_document, write_text
    from tests.executor.placements import placement

    write_document(tmp_path / "plan.json", placement({}))
    node = '- {name: a, address: "127.0.0.1:1", gpus: {type: cpu, count: 1}}'
    write_text(tmp_path / "cluster.yaml", f"gpu_types: {{cpu: {{memory: 1GiB}}}}\nnodes:\n  {node}\n")
    record = tmp_path / "store" / "generations" / "0000000001.json"
    record.parent.mkdir(parents=True)
    write_text(record, "{")
    where = ["--cluster", tmp_path / "cluster.yaml", "--gateway", "127.0.0.1:1", "--store", tmp_path / "store"]
    refused = foreplan("apply", tmp_path / "plan.json", *where)
    assert refused.exit_code == 1
    assert f"{record}:1: found " in refused.stderr
    assert "restore this generation record from a backup or delete it" in refused.stderr
