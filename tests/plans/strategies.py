"""Hypothesis strategies for documents, shared by the tests of every package."""

from __future__ import annotations

from hypothesis import strategies as st

from plans import Cluster, Group, LoadoutEntry, Plan, Route, SolverReport, group_id

SERVICES = ("detect", "segment", "classify", "embed")
SOLVER = SolverReport(name="test", status="optimal", objective=1.0, bound=1.0, gap=0.0, wall_s=0.0, seed=0)
MEMORY_BYTES = 1000


def cluster(nodes: int = 2, gpus: int = 4) -> Cluster:
    """Return a cluster of equal nodes with small, round memories."""
    return Cluster.model_validate(
        {
            "gpu_types": {"tiny": {"memory": MEMORY_BYTES, "cost_per_hour": 1.0}},
            "nodes": [
                {"name": f"node-{n}", "address": f"127.0.0.1:{7000 + n}", "gpus": {"type": "tiny", "count": gpus}}
                for n in range(nodes)
            ],
        }
    )


def entry(service: str, gpus: int = 1, stages: int = 1, **changes: object) -> LoadoutEntry:
    """Return a loadout entry with two batch sizes; fields can be changed."""
    fields: dict[str, object] = {
        "service": service,
        "variant": f"{service}-model",
        "max_batch": 2,
        "rate_rps": 1.0,
        "memory_bytes": (100,) * gpus,
        "weight_bytes": 60 * gpus,
        "load_s": 0.5,
        "deadline_s": 1.0,
        "stage_latency_s": tuple((0.01 * (b + 1) / stages,) * stages for b in range(2)),
    }
    return LoadoutEntry.model_validate(fields | changes)


def group(node: str, gpus: tuple[int, ...], entries: list[LoadoutEntry], pp: int = 1) -> Group:
    """Return a group of ``gpus`` on ``node``."""
    tp = len(gpus) // pp
    return Group(id=group_id(node, gpus), node=node, gpus=gpus, tp=tp, pp=pp, loadout=tuple(entries))


def plan(groups: list[Group], **fields: object) -> Plan:
    """Return a plan over ``groups`` with routes in proportion to the rates."""
    routes: dict[str, tuple[Route, ...]] = {}
    for service in sorted({e.service for g in groups for e in g.loadout}):
        hosts = [(g.id, e.rate_rps) for g in groups for e in g.loadout if e.service == service]
        total = sum(rate for _, rate in hosts)
        if total > 0:
            routes[service] = tuple(Route(group=name, weight=rate / total) for name, rate in hosts if rate > 0)
    return Plan.model_validate({"solver": SOLVER, "groups": tuple(groups), "routes": routes} | fields)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Draw a plan over the nodes of `cluster`, within memory."""
    groups = []
    for node in ("node-0", "node-1"):
        tiles = draw(
            st.sampled_from([[(0,), (1,), (2,), (3,)], [(0, 1), (2,), (3,)], [(0, 1), (2, 3)], [(0, 1, 2, 3)]])
        )
        for tile in tiles:
            services = draw(st.lists(st.sampled_from(SERVICES), unique=True, max_size=3))
            if services:
                pp = draw(st.sampled_from([size for size in (1, 2) if len(tile) % size == 0]))
                entries = [
                    entry(
                        service,
                        len(tile),
                        pp,
                        variant=draw(st.sampled_from(["small", "large"])),
                        rate_rps=draw(st.floats(0.5, 50.0)),
                        memory_bytes=(draw(st.integers(50, 300)),) * len(tile),
                    )
                    for service in services
                ]
                groups.append(group(node, tile, entries, pp))
    return plan(groups, warnings=tuple(draw(st.lists(st.sampled_from(["w1", "w2"]), max_size=2))))
