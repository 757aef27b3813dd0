"""Whether a node can run what it is asked to: every reason why not, before anything is touched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from executor.runtime.sizes import split_size
from executor.state import DesiredGroup, DesiredState
from plans.errors import Fault
from plans.units import format_bytes

__all__ = ["NodeFacts", "memory_faults", "placement_faults"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What a node has: its name, its devices, memory of each in bytes, and the variants that its runtime knows.

    With ``swaps`` the models of a group of one device take turns there, but for those that generate.
    """

    node: str
    device_count: int
    memory_bytes: int
    variants: Collection[str]
    swaps: bool = False


def placement_faults(desired: DesiredState, facts: NodeFacts) -> tuple[Fault, ...]:
    """Return every reason why the node cannot run ``desired``; none when it can."""
    return tuple(_faults(desired, facts))


def _faults(desired: DesiredState, facts: NodeFacts) -> Iterator[Fault]:
    if desired.node != facts.node:
        remedy = "check the addresses in the cluster document"
        yield Fault(field="node", found=repr(desired.node), expected=f"{facts.node!r}, this node", remedy=remedy)
    for group in desired.groups:  # on the way between plans, groups of both may share devices
        yield from _group_faults(group, facts)
    yield from memory_faults(desired, facts)


def _group_faults(group: DesiredGroup, facts: NodeFacts) -> Iterator[Fault]:
    field = f"groups[{group.id}]"
    for gpu in group.gpus:
        if gpu >= facts.device_count:
            expected = f"a device from 0 to {facts.device_count - 1}"
            remedy = "start the agent with more devices, or correct the cluster document"
            yield Fault(field=f"{field}.gpus", found=str(gpu), expected=expected, remedy=remedy)
    for variant in sorted({one.variant for one in group.replicas if one.generation is not None}):
        whole = [one.service for one in group.replicas if one.variant == variant and one.generation is None]
        if whole:
            expected = "one model of a group to generate for all of its services there, or for none"
            remedy = "pin one of the services to another group"
            found = f"{', '.join(whole)} not"
            yield Fault(field=f"{field}.{variant}", found=found, expected=expected, remedy=remedy)
    for replica in group.replicas:
        if split_size(replica.variant, facts.variants) is None:
            known = ", ".join(sorted(facts.variants))
            where = f"{field}.{replica.service}.variant"
            remedy = "put the model's folder into the agent's model folder, or plan with known variants"
            yield Fault(field=where, found=repr(replica.variant), expected=f"one of {known}", remedy=remedy)


def memory_faults(desired: DesiredState, facts: NodeFacts) -> Iterator[Fault]:
    """Yield every device of the node that has less memory than ``desired`` needs there."""
    used: dict[int, int] = defaultdict(int)
    for group in desired.groups:
        for position, gpu in enumerate(group.gpus):
            sizes = [(replica.memory_bytes[position], replica.generation is not None) for replica in group.replicas]
            if facts.swaps and len(group.gpus) == 1:
                used[gpu] += sum(size for size, stays in sizes if stays)
                used[gpu] += max((size for size, stays in sizes if not stays), default=0)
            else:
                used[gpu] += sum(size for size, _ in sizes)
    for gpu, size in sorted(used.items()):
        if size > facts.memory_bytes:
            found = f"{size} bytes ({format_bytes(size)})"
            expected = f"at most {facts.memory_bytes} bytes ({format_bytes(facts.memory_bytes)}) on device {gpu}"
            remedy = "plan again with the memory that this node has"
            yield Fault(field="memory_bytes", found=found, expected=expected, remedy=remedy)
