"""The README's commands work as they stand, in order, on the shipped inputs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from foreplan.ports import free_ports

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = [
    block
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    if not block.startswith("make ")
]


@pytest.fixture(scope="module")
def transcript(tmp_path_factory):
    """Run all blocks in one shell, in a folder that looks like a checkout, on ports that are free."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / ".venv").symlink_to(sys.prefix)
    script = "\n".join(BLOCKS)
    cluster = (folder / "examples" / "cluster.yaml").read_text()
    for port, free in zip(("7443", "7444", "8001"), free_ports(3), strict=True):
        script = script.replace(f":{port}", f":{free}")
        cluster = cluster.replace(f":{port}", f":{free}")
    (folder / "examples" / "cluster.yaml").write_text(cluster)
    script = f"set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null; wait' EXIT\n{script}"
    with subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            said, complaints = shell.communicate(timeout=1200)
        finally:
            with suppress(ProcessLookupError):  # whatever it left in the background
                os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, said + complaints
    return folder, said


def test_every_command_ends_well(transcript):
    assert "applied as generation 1" in transcript[1]


def test_the_applied_plan_serves_and_can_be_rolled_back(transcript):
    _, said = transcript
    assert "attainment" in said
    assert "rolling back to the plan of generation 1" in said


def test_the_report_is_written(transcript):
    folder, _ = transcript
    assert "node-a" in (folder / "scratch" / "report.html").read_text()


def test_the_readme_names_no_command_that_does_not_exist():
    from typer.main import get_command

    from foreplan.cli.app import app

    known = set(get_command(app).commands)
    named = set(re.findall(r"^foreplan ([a-z]+)", "\n".join(BLOCKS), flags=re.MULTILINE))
    assert named <= known
