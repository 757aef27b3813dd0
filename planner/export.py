"""Models as files that other solvers read: LP as it stands, MPS through PuLP."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pulp

from planner.linear import LinearModel
from planner.pulp_backend import translated

__all__ = ["mps_text"]


def mps_text(model: LinearModel) -> str:
    """Return ``model`` in free MPS format, minimised: an objective to maximise changes its sign.

    Columns are v0, v1, ... and rows _C1, _C2, ... in the order of the model; comments at the top name the columns.
    """
    problem, _ = translated(model)
    names = "".join(f"* v{column} {name}\n" for column, name in enumerate(model.variables))
    with tempfile.TemporaryDirectory(prefix="foreplan-mps-") as folder:
        path = Path(folder) / "model.mps"
        problem.writeMPS(str(path), mpsSense=pulp.LpMinimize)
        return names + path.read_text(encoding="utf-8")
