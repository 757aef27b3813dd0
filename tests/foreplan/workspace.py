"""A small, complete set of inputs in a folder, and the program run on them as a user would."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from foreplan.ports import free_ports

ROOT = Path(__file__).resolve().parent.parent.parent

SERVICES = """\
services:
  - name: fast
    slo: {deadline: 500ms, attainment: 0.9}
    variants: [{model: fake-double, accuracy: 0.9}]
    min_replicas: 2
  - name: slow
    slo: {deadline: 1s, attainment: 0.9}
    variants: [{model: fake-slow-20}]
"""


def cluster_text(ports):
    nodes = "".join(
        f'  - {{name: node-{name}, address: "127.0.0.1:{port}", gpus: {{type: fake, count: 2}}}}\n'
        for name, port in zip("ab", ports, strict=True)
    )
    return f"gpu_types:\n  fake: {{memory: 1MiB}}\nnodes:\n{nodes}"


def profile_text(model, batch_1_s):
    rows = [
        {
            "batch": batch,
            "latency_s": {"mean": batch_1_s * (1 + 0.1 * (batch - 1))},
            "stage_latency_s": [batch_1_s * (1 + 0.1 * (batch - 1))],
            "weight_bytes": [1024],
            "peak_bytes": [2048 + 100 * batch],
            "load_s": 0.01,
            "samples": 100,
        }
        for batch in (1, 2, 4)
    ]
    return json.dumps({"format_version": "1.0", "model": model, "gpu_type": "fake", "source": "measured", "rows": rows})


@dataclass(frozen=True)
class Workspace:
    folder: Path
    gateway: str

    @classmethod
    def make(cls, folder):
        ports = free_ports(3)
        (folder / "cluster.yaml").write_text(cluster_text(ports[:2]))
        (folder / "services.yaml").write_text(SERVICES)
        (folder / "profiles").mkdir()
        (folder / "profiles" / "double.json").write_text(profile_text("fake-double", 0.002))
        (folder / "profiles" / "slow.json").write_text(profile_text("fake-slow-20", 0.021))
        demand = {
            "window_s": 60,
            "services": [
                {"service": "fast", "rate_rps": [{"mean": 20.0}]},
                {"service": "slow", "rate_rps": [{"mean": 8.0}]},
            ],
        }
        (folder / "demand.json").write_text(json.dumps(demand))
        return cls(folder=folder, gateway=f"127.0.0.1:{ports[2]}")

    def run(self, *arguments, code=0):
        """Run ``foreplan`` in the folder and check its exit code."""
        result = subprocess.run(
            [sys.executable, "-m", "foreplan", *map(str, arguments)],
            cwd=self.folder,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
        assert "Traceback" not in result.stderr
        return result

    def change(self, name, old, new):
        """Damage a file by hand."""
        path = self.folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    @property
    def inputs(self):
        return ["--cluster", "cluster.yaml", "--services", "services.yaml", "--profiles", "profiles"]

    def plan(self, *more, output="plan.json", code=0):
        return self.run("plan", *self.inputs, "--demand", "demand.json", "-o", output, *more, code=code)

    def files(self):
        return sorted(path.name for path in self.folder.iterdir())
