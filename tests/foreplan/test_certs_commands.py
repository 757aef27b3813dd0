from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from foreplan.cli.app import app


def foreplan(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments])


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


def test_servers_off_loopback_need_certificates(tmp_path: Path) -> None:
    refused = foreplan("gateway", "--listen", "0.0.0.0:0", "--state-dir", tmp_path)
    assert refused.exit_code == 1
    assert "--insecure" in refused.stderr
