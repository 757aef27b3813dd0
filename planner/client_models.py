"""Linear models of Jellyfish's problem: GPUs counted per kind with clients in pieces, and whole clients on known GPUs.

docs/formulation.md, section 11.
"""

from __future__ import annotations

import numpy as np

from planner.client_patterns import Kinds, reachable_fps
from planner.linear import Integers, LinearModel, ModelBuilder

__all__ = ["counts_model", "places_model"]


def counts_model(kinds: Kinds, gpus: int, usable: Integers) -> LinearModel:
    """Return (11.1) to (11.4) over the kinds ``usable``: clients may be cut, and GPUs of one kind are pooled."""
    builder = ModelBuilder()
    most = np.full(len(usable), float(gpus))
    count = builder.add_variables([f"gpus[{kind}]" for kind in usable], upper=most, integer=True)
    builder.add_row("gpus", count, np.ones(len(usable)), upper=float(gpus))
    objective = [0.0] * len(usable)
    rows: dict[int, list[int]] = {client: [] for client in range(len(kinds.fps))}
    reach = reachable_fps(kinds)
    for position, kind in enumerate(usable):
        mine = np.flatnonzero(kinds.able[kind])
        names = [f"part[{client},{kind}]" for client in mine]
        part = builder.add_variables(names, upper=np.ones(len(mine)), integer=False)
        objective.extend(kinds.fps[mine] * kinds.accuracy[kind])
        values = np.append(kinds.fps[mine], -reach[kind])
        builder.add_row(f"rate[{kind}]", np.append(part, count[position]), values, upper=0.0)
        for client, column in zip(mine.tolist(), part.tolist(), strict=True):
            rows[client].append(column)
    for client, columns in rows.items():
        if columns:
            builder.add_row(f"client[{client}]", columns, np.ones(len(columns)), upper=1.0)
    return builder.build().with_objective(np.array(objective), maximise=True)


def places_model(kinds: Kinds, chosen: Integers) -> tuple[LinearModel, Integers, Integers]:
    """Return the model of whole clients on GPUs of the kinds ``chosen``, with each variable's GPU and client."""
    gpu_of, client_of = np.nonzero(kinds.able[chosen])
    builder = ModelBuilder()
    names = [f"serves[{gpu},{client}]" for gpu, client in zip(gpu_of, client_of, strict=True)]
    builder.add_variables(names, upper=np.ones(len(names)), integer=True)
    for gpu in np.unique(gpu_of):
        mine = np.flatnonzero(gpu_of == gpu)
        room = float(kinds.throughput[chosen[gpu]])
        builder.add_row(f"rate[{gpu}]", mine, kinds.fps[client_of[mine]], upper=room)
    for client in np.unique(client_of):
        mine = np.flatnonzero(client_of == client)
        builder.add_row(f"client[{client}]", mine, np.ones(len(mine)), upper=1.0)
    worth = kinds.fps[client_of] * kinds.accuracy[chosen[gpu_of]]
    return builder.build().with_objective(worth, maximise=True), gpu_of, client_of
