"""What must be served: services with an SLO and variants, and workflows of services (``services.yaml``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AliasChoices, Discriminator, Field, Tag, model_validator

from plans.cluster import Cluster, Name
from plans.documents import Document
from plans.errors import Fault, InvalidInput
from plans.units import Bytes, PositiveSeconds, Seconds

__all__ = [
    "Edge",
    "FrequencyService",
    "FrequencySlo",
    "GenerationService",
    "GenerationSlo",
    "Join",
    "LatencyService",
    "LatencySlo",
    "Service",
    "Services",
    "Spread",
    "Variant",
    "Workflow",
    "check_against_cluster",
]

Attainment = Annotated[float, Field(gt=0, lt=1)]


class LatencySlo(Document):
    """A share ``attainment`` of all requests finishes within ``deadline_s`` of its arrival."""

    deadline_s: PositiveSeconds = Field(validation_alias=AliasChoices("deadline", "deadline_s"))
    attainment: Attainment = 0.99


class FrequencySlo(Document):
    """Frames arrive at ``fps`` per stream; each must be done within a frame period plus ``jitter_s``."""

    fps: float = Field(gt=0, allow_inf_nan=False)
    jitter_s: Seconds = Field(default=0.0, validation_alias=AliasChoices("jitter", "jitter_s"))
    attainment: Attainment = 0.99


class GenerationSlo(Document):
    """First token within ``ttft_s``, every further one within ``tpot_s`` on average."""

    ttft_s: PositiveSeconds = Field(validation_alias=AliasChoices("ttft", "ttft_s"))
    tpot_s: PositiveSeconds = Field(validation_alias=AliasChoices("tpot", "tpot_s"))
    attainment: Attainment = 0.95


class Variant(Document):
    """One model that can serve the service."""

    model: Name
    accuracy: float = Field(default=1.0, ge=0, le=1)


class Spread(Document):
    """How replicas are spread over failure domains: nodes, or zones (nodes that state no zone make up one together).

    Domains in which no option of the service may run do not count. ``spread: zone`` is short for ``{over: zone}``.

    Attributes:
        over: What fails together.
        max_skew: Most by which the numbers of replicas in two domains may differ.
        min_domains: Domains that hold at least one replica each, hard like ``min_replicas``.
    """

    over: Literal["node", "zone"]
    max_skew: int = Field(default=1, ge=1)
    min_domains: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: object) -> object:
        return {"over": data} if isinstance(data, str) else data


class _Service(Document):
    name: Name
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    variants: tuple[Variant, ...] = Field(min_length=1)
    min_accuracy: float = Field(default=0.0, ge=0, le=1)
    min_replicas: int = Field(default=0, ge=0)
    max_gpus: int | None = Field(default=None, ge=0)
    pin: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    spread: Spread | None = None

    @model_validator(mode="after")
    def _variants_differ(self) -> _Service:
        models = [variant.model for variant in self.variants]
        if len(set(models)) < len(models):
            raise ValueError("every variant of a service to name another model")
        if all(variant.accuracy < self.min_accuracy for variant in self.variants):
            best = max(variant.accuracy for variant in self.variants)
            raise ValueError(f"a variant with accuracy >= min_accuracy {self.min_accuracy}: the best has {best}")
        return self

    def accuracy_of(self, model: str) -> float:
        """Return the accuracy of the variant ``model``.

        Raises:
            KeyError: The service has no such variant.
        """
        for variant in self.variants:
            if variant.model == model:
                return variant.accuracy
        raise KeyError(model)

    def allows(self, node: str, gpus: tuple[int, ...]) -> bool:
        """Say whether ``pin`` and ``forbid`` let the service run on these devices of ``node``."""
        names = [{node, f"{node}/{gpu}"} for gpu in gpus]
        pinned = not self.pin or all(name & set(self.pin) for name in names)
        return pinned and not any(name & set(self.forbid) for name in names)


class LatencyService(_Service):
    """A service with a deadline per request."""

    request_class: Literal["latency"] = Field(
        default="latency", validation_alias=AliasChoices("class", "request_class"), serialization_alias="class"
    )
    slo: LatencySlo

    def deadline_s(self, output_tokens: float | None = None) -> float:
        """Return the time that a request may take from its arrival, in seconds."""
        return self.slo.deadline_s


class FrequencyService(_Service):
    """A service of frame streams."""

    request_class: Literal["frequency"] = Field(
        default="frequency", validation_alias=AliasChoices("class", "request_class"), serialization_alias="class"
    )
    slo: FrequencySlo

    def deadline_s(self, output_tokens: float | None = None) -> float:
        """Return the time that a frame may take: one period plus the jitter allowed, in seconds."""
        return 1.0 / self.slo.fps + self.slo.jitter_s


class GenerationService(_Service):
    """A service that generates tokens."""

    request_class: Literal["generation"] = Field(
        default="generation", validation_alias=AliasChoices("class", "request_class"), serialization_alias="class"
    )
    slo: GenerationSlo

    def deadline_s(self, output_tokens: float | None = None) -> float:
        """Return the time that a whole answer of ``output_tokens`` (default 128) may take, in seconds."""
        return self.slo.ttft_s + self.slo.tpot_s * max(0.0, (128.0 if output_tokens is None else output_tokens) - 1.0)


Service = LatencyService | FrequencyService | GenerationService
"""Any service. ``class`` in the document tells which; without it the service is of class latency."""


def _class_of(data: object) -> str:
    if isinstance(data, dict):
        return str(data.get("class", data.get("request_class", "latency")))
    return str(getattr(data, "request_class", "latency"))


_AnyService = Annotated[
    Annotated[LatencyService, Tag("latency")]
    | Annotated[FrequencyService, Tag("frequency")]
    | Annotated[GenerationService, Tag("generation")],
    Discriminator(_class_of),
]


class Edge(Document):
    """``fanout`` calls of ``to`` for each finished call of ``from``, each handing over ``bytes``.

    With ``probability`` the edges that leave ``from`` are a switch: at most one of them is taken, each that often.

    Attributes:
        inputs: For the executor: which output of ``from`` becomes which input of ``to``. What no edge names, the client
            sends along as ``<service>.<input>``.
        scatter: For the executor: one call for each row of what ``inputs`` hands over, whatever ``fanout`` says, which
            is then what planner and simulator count on.
    """

    source: Name = Field(validation_alias=AliasChoices("from", "source"), serialization_alias="from")
    target: Name = Field(validation_alias=AliasChoices("to", "target"), serialization_alias="to")
    fanout: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    payload_bytes: Bytes = Field(default=0, validation_alias=AliasChoices("bytes", "payload_bytes"))
    probability: float | None = Field(default=None, gt=0, le=1)
    inputs: Mapping[str, str] = Field(default={}, exclude_if=lambda inputs: not inputs)
    scatter: bool = Field(default=False, exclude_if=lambda scatter: not scatter)

    @model_validator(mode="after")
    def _something_to_scatter(self) -> Edge:
        if self.scatter and not self.inputs:
            raise ValueError("inputs on an edge with scatter: its calls are the rows that it hands over")
        return self


Join = Literal["all", "any"]
"""When a stage of a workflow starts: when everything that leads to it has finished, or when the first has."""


class Workflow(Document):
    """A directed acyclic graph of services with an end-to-end deadline.

    ``affinity`` says whether what passes along its edges should stay on one node: ``prefer`` makes the bytes that cross
    nodes an objective, ``require`` lets none cross, ``none`` does not care. ``joins`` says when the stage of a service
    starts, where it is not ``all``. Requests of a trace that name the workflow run through all of it. There are at most
    128 edges, so that stages and edges are numbered in 8 bits.
    """

    name: Name
    slo: LatencySlo
    edges: tuple[Edge, ...] = Field(min_length=1, max_length=128)
    joins: Mapping[Name, Join] = {}
    affinity: Literal["none", "prefer", "require"] = "prefer"

    @model_validator(mode="after")
    def _acyclic(self) -> Workflow:
        import networkx  # here, because only documents with workflows pay for it

        graph = networkx.DiGraph((edge.source, edge.target) for edge in self.edges)
        if not networkx.is_directed_acyclic_graph(graph):
            cycle = " -> ".join(source for source, _ in networkx.find_cycle(graph))
            raise ValueError(f"a workflow without a cycle: {cycle} runs in a circle")
        return self

    @model_validator(mode="after")
    def _joins_and_switches_agree(self) -> Workflow:
        targets = {edge.target for edge in self.edges}
        if stray := sorted(self.joins.keys() - targets):
            raise ValueError(f"joins of services that some edge leads to: found {', '.join(stray)}")
        for source in dict.fromkeys(edge.source for edge in self.edges):
            chances = [edge.probability for edge in self.edges if edge.source == source]
            stated = [chance for chance in chances if chance is not None]
            if stated and len(stated) < len(chances):
                raise ValueError(f"a probability on every edge from {source!r} or on none")
            if sum(stated) > 1 + 1e-9:
                raise ValueError(f"probabilities from {source!r} of at most 1 together: found {sum(stated):.6g}")
        return self


class Services(Document):
    """Every service and workflow; names are unique and workflows name known services."""

    services: tuple[_AnyService, ...] = Field(min_length=1)
    workflows: tuple[Workflow, ...] = ()

    @model_validator(mode="after")
    def _names_agree(self) -> Services:
        names = [service.name for service in self.services]
        for position, name in enumerate(names):
            if name in names[:position]:
                raise ValueError(f"services[{position}].name to be a name of its own: found {name!r} again")
        for position, workflow in enumerate(self.workflows):
            if workflow.name in names or workflow.name in [each.name for each in self.workflows[:position]]:
                raise ValueError(f"workflows[{position}].name to be a name of its own: found {workflow.name!r} again")
            for edge in workflow.edges:
                for end in (edge.source, edge.target):
                    if end not in names:
                        raise ValueError(f"workflow {workflow.name!r} to name known services: {end!r} is none")
        return self

    def service(self, name: str) -> Service:
        """Return the service called ``name``.

        Raises:
            KeyError: There is none.
        """
        for service in self.services:
            if service.name == name:
                return service
        raise KeyError(name)

    def workflow(self, name: str) -> Workflow:
        """Return the workflow called ``name``.

        Raises:
            KeyError: There is none.
        """
        for workflow in self.workflows:
            if workflow.name == name:
                return workflow
        raise KeyError(name)


def check_against_cluster(services: Services, cluster: Cluster, *, where: str) -> None:
    """Check that pins and forbids name nodes or devices of ``cluster``.

    Raises:
        InvalidInput: With one fault for each that does not.
    """
    places = {node.name for node in cluster.nodes} | {str(gpu) for gpu in cluster.gpus()}
    faults = [
        Fault(where=where, field=f"services[{position}].{field}", found=repr(place), expected="a node or node/index")
        for position, service in enumerate(services.services)
        for field, named in (("pin", service.pin), ("forbid", service.forbid))
        for place in named
        if place not in places
    ]
    if faults:
        raise InvalidInput(faults)
