"""The placement drawn as a map: nodes, their devices, what each runs, and how full each is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from plans.cluster import Cluster, GpuType, Node
from plans.plan import Group, LoadoutEntry, Plan
from plans.units import format_bytes

__all__ = ["PALETTE", "placement_map", "planned_utilisation", "service_colors"]

PALETTE = ("#2f6db3", "#d9822b", "#3a9d6e", "#8a5cb8", "#c0435a", "#5a9fa8", "#8a7a2f", "#b35ea0", "#596b7d", "#6c8f2a")


def service_colors(plan: Plan) -> Mapping[str, str]:
    """Return a colour for each service that the plan names, the same wherever it is drawn."""
    names = {prediction.service for prediction in plan.predicted}
    names |= {entry.service for group in plan.groups for entry in group.loadout}
    return {name: PALETTE[position % len(PALETTE)] for position, name in enumerate(sorted(names))}


def planned_utilisation(group: Group) -> float:
    """Return the share of the group's time that its planned rates take at full batches."""
    return sum(entry.rate_rps / entry.max_batch * max(entry.stage_latency_s[-1]) for entry in group.loadout)


def placement_map(plan: Plan, cluster: Cluster, utilisation: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return the map as HTML.

    Args:
        plan: What runs where.
        cluster: All nodes and devices, also the idle ones.
        utilisation: Label (such as "simulated") to group to share of time busy, in [0, 1]; drawn beside the plan's.
    """
    colors = service_colors(plan)
    hosted = {(group.node, gpu): group for group in plan.groups for gpu in group.gpus}
    nodes = "".join(
        _node(node, cluster.gpu_types[node.gpus.type], hosted, colors, utilisation) for node in cluster.nodes
    )
    return f'<div class="nodes">{nodes}</div>'


def _node(
    node: Node,
    gpu_type: GpuType,
    hosted: Mapping[tuple[str, int], Group],
    colors: Mapping[str, str],
    utilisation: Mapping[str, Mapping[str, float | None]],
) -> str:
    devices = "".join(
        _device(node, index, gpu_type, hosted.get((node.name, index)), colors, utilisation)
        for index in range(node.gpus.count)
    )
    head = f"<b>{escape(node.name)}</b> {node.gpus.count} x {escape(node.gpus.type)}"
    return f'<section class="node"><header>{head}</header><div class="devices">{devices}</div></section>'


def _device(
    node: Node,
    index: int,
    gpu_type: GpuType,
    group: Group | None,
    colors: Mapping[str, str],
    utilisation: Mapping[str, Mapping[str, float | None]],
) -> str:
    head = f'<div class="device-name">{escape(node.name)}/{index}</div>'
    if group is None:
        return f'<div class="device idle">{head}<div class="muted">idle</div></div>'
    place = group.gpus.index(index)
    chips = "".join(_chip(entry, colors) for entry in group.loadout)
    parts = [(entry.memory_bytes[place] / gpu_type.memory_bytes, colors[entry.service]) for entry in group.loadout]
    used = sum(entry.memory_bytes[place] for entry in group.loadout)
    bars = _bar("memory", parts, f"{format_bytes(used)} of {format_bytes(gpu_type.memory_bytes)}")
    bars += _bar("planned load", [(planned_utilisation(group), "#8795a5")], f"{planned_utilisation(group):.0%}")
    for label, shares in utilisation.items():
        share = shares.get(group.id)
        if share is not None:
            bars += _bar(f"{label} load", [(share, "#51606f")], f"{share:.0%}")
    shape = f'<div class="muted">group {escape(group.id)}, tp {group.tp}, pp {group.pp}</div>' if place == 0 else ""
    return f'<div class="device">{head}{shape}{chips}{bars}</div>'


def _chip(entry: LoadoutEntry, colors: Mapping[str, str]) -> str:
    rate = f"{entry.rate_rps:.3g} rps" if entry.rate_rps > 0 else "stands by"
    text = f"{entry.variant}, batch {entry.max_batch}, {rate}"
    return (
        f'<div class="chip" style="border-color:{colors[entry.service]}"><b>{escape(entry.service)}</b>'
        f'<span class="muted">{escape(text)}</span></div>'
    )


def _bar(name: str, parts: Sequence[tuple[float, str]], text: str) -> str:
    fills = "".join(
        f'<i style="width:{max(0.0, min(share, 1.0)) * 100:.2f}%;background:{color}"></i>' for share, color in parts
    )
    label = f'<div class="bar-row"><span>{escape(name)}</span><span>{escape(text)}</span></div>'
    return f'{label}<div class="bar">{fills}</div>'
