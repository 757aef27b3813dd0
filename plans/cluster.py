"""What there is to place on: GPU types, nodes, and the network between them (``cluster.yaml``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AliasChoices, Field, StringConstraints, field_validator, model_validator

from plans.catalogue import catalogue
from plans.documents import Document
from plans.units import Bytes, BytesPerSecond, Seconds

__all__ = ["Cluster", "Gpu", "GpuType", "Name", "Network", "Node", "NodeGpus", "group_id"]

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
"""A name that can stand in a group id, a file name and a URL: letters, digits, ``.``, ``_``, ``-``."""


class GpuType(Document):
    """A kind of device: its memory, price and the bandwidth at which weights reach it.

    Where a profile states no load time, a load takes the weights of one device over ``load_bandwidth``.
    """

    memory_bytes: Bytes = Field(gt=0, validation_alias=AliasChoices("memory", "memory_bytes"))
    cost_per_hour: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    load_bandwidth: BytesPerSecond | None = None


class NodeGpus(Document):
    """The devices of one node: all of one type, numbered from 0."""

    type: Name
    count: int = Field(gt=0, le=1024)


class Node(Document):
    """A machine with an agent. ``address`` is ``host:port`` of that agent."""

    name: Name
    address: str = Field(default="", pattern=r"^$|^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$")
    gpus: NodeGpus
    intra_bandwidth: BytesPerSecond | None = None
    zone: str = ""


class Network(Document):
    """The network between nodes."""

    bandwidth: BytesPerSecond = 1.25e9
    latency_s: Seconds = Field(default=50e-6, validation_alias=AliasChoices("latency", "latency_s"))


@dataclass(frozen=True, slots=True, order=True)
class Gpu:
    """One device, written ``node/index``."""

    node: str
    index: int

    def __str__(self) -> str:
        return f"{self.node}/{self.index}"


class Cluster(Document):
    """The inventory: every node has a known GPU type and a name of its own.

    A GPU type that is named as in the catalogue (`plans.catalogue`) may leave out its memory.
    """

    gpu_types: Mapping[Name, GpuType] = Field(min_length=1)
    nodes: tuple[Node, ...] = Field(min_length=1)
    network: Network = Network()

    @field_validator("gpu_types", mode="before")
    @classmethod
    def _catalogued(cls, types: Any) -> Any:
        if not isinstance(types, Mapping):
            return types
        return {name: _with_memory(name, stated) for name, stated in types.items()}

    @model_validator(mode="after")
    def _names_agree(self) -> Cluster:
        seen: set[str] = set()
        addresses: set[str] = set()
        for position, node in enumerate(self.nodes):
            if node.name in seen:
                raise ValueError(f"nodes[{position}].name to be a name of its own: found {node.name!r} again")
            seen.add(node.name)
            if node.address and not 0 < int(node.address.rpartition(":")[2]) < 65536:
                raise ValueError(
                    f"nodes[{position}].address to be host:port with a port of 1 to 65535: found {node.address!r}"
                )
            if node.address and node.address in addresses:
                raise ValueError(f"nodes[{position}].address to be one of its own: found {node.address!r} again")
            addresses.add(node.address)
            if node.gpus.type not in self.gpu_types:
                known = ", ".join(sorted(self.gpu_types))
                raise ValueError(f"nodes[{position}].gpus.type to be one of {known}: found {node.gpus.type!r}")
        return self

    def node(self, name: str) -> Node:
        """Return the node called ``name``.

        Raises:
            KeyError: There is none.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def gpu_type_of(self, node: str) -> GpuType:
        """Return the GPU type of the node called ``node``."""
        return self.gpu_types[self.node(node).gpus.type]

    def gpus(self) -> Iterator[Gpu]:
        """Yield every device, in the order of the document."""
        for node in self.nodes:
            for index in range(node.gpus.count):
                yield Gpu(node.name, index)


def _with_memory(name: Any, stated: Any) -> Any:
    if stated is None:
        stated = {}
    if not isinstance(stated, Mapping) or {"memory", "memory_bytes"} & stated.keys() or name not in catalogue():
        return stated
    return {**stated, "memory_bytes": catalogue()[name].memory}


def group_id(node: str, gpus: tuple[int, ...]) -> str:
    """Return the id of a GPU group: ``node-a/0`` for one device, ``node-a/0-3`` for a run, ``node-a/0+2`` otherwise."""
    if len(gpus) == 1:
        return f"{node}/{gpus[0]}"
    if list(gpus) == list(range(gpus[0], gpus[-1] + 1)):
        return f"{node}/{gpus[0]}-{gpus[-1]}"
    return f"{node}/{'+'.join(map(str, gpus))}"
