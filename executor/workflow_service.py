"""Workflows as an agent offers them: requests for one, or for a part of one, beside those for its services."""

from __future__ import annotations

import asyncio
import itertools
import time
import zlib
from collections.abc import Callable, Sequence

import grpc

from executor.errors import ReplicaUnavailable, UnknownService
from executor.forwarding import CallFailed
from executor.infer_header import LONGEST_DEADLINE_S
from executor.node import Node
from executor.proto import open_inference_pb2 as pb
from executor.request_head import RequestHead
from executor.routing import NodeView
from executor.state import Phase, RoutingTable
from executor.statistics import Counters
from executor.tensors import Buffer, TensorLimits, decode_inputs, decode_raw, encode_response, parameter
from executor.tls import Dialer
from executor.tracing import NoSpans
from executor.workflow import DIGEST_PARAMETER, HOME, POSITION_PARAMETER, STAGE_PARAMETER, Structure
from executor.workflow_local import LocalStages
from executor.workflow_routes import Successors
from executor.workflow_run import PartCall, WorkflowRunner
from executor.workflow_tensors import by_stage
from plans.errors import InvalidInput

__all__ = ["Workflows"]

_MOST_KNOWN = 64
"""Definitions that are remembered: requests that are under way go on with the one that they began with."""

_MOST_POSITION = 2**48
_ASK_S = 5.0
_PASSED_ON = ("priority", "max_tokens", "ignore_eos", "input_tokens")
"""Parameters of a request that its stages are told of."""

_DROPPED = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED}

Describe = Callable[[str, str | None], pb.ModelMetadataResponse]
"""Returns what a replica on this node takes and gives, by service and group."""


class Workflows:
    """The workflows of one node. `follow` is to be called whenever what the node runs has changed.

    Args:
        node: The node.
        describe: Tells of its own replicas.
        dialer: Opens channels to other agents.
        limits: What one request may hold.
        max_message_bytes: Largest message to and from other agents.
        clock: The clock of the node's groups.
        spans: Records every call of a stage; None records nothing.

    Attributes:
        counters: What became of requests for each workflow that began here.
    """

    def __init__(
        self,
        node: Node,
        describe: Describe,
        *,
        dialer: Dialer,
        limits: TensorLimits,
        max_message_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        spans: NoSpans | None = None,
    ) -> None:
        self.counters: dict[str, Counters] = {}
        self._node = node
        self._describe = describe
        self._limits = limits
        self._clock = clock
        self._known: dict[str, Structure] = {}  # by digest
        self._named: dict[str, Structure] = {}  # that new requests mean
        self._tables: list[RoutingTable] = []
        self._positions = itertools.count(zlib.crc32(node.settings.node.encode()))
        self._successors = Successors(
            node.settings.node, self._own_view, dialer=dialer, max_message_bytes=max_message_bytes
        )
        self._runner = WorkflowRunner(LocalStages(node, limits), self._successors, limits, clock, spans)

    def follow(self) -> None:
        """Take up the workflows and routes of what the node runs now."""
        states = self._node.in_force
        kept = [state for state in states if state is not self._node.staged]
        self._named = {}
        for state in kept:
            for rules in state.workflows:
                structure = Structure.of(rules)
                self._named.setdefault(rules.name, structure)
                self._remember(structure)
        tables = [state.handover for state in kept if state.handover is not None]
        if tables:  # without, what is still under way goes by the last ones
            self._tables = tables
        self._successors.follow(self._tables, watched=bool(self._named))

    def _remember(self, structure: Structure) -> None:
        self._known.pop(structure.digest, None)
        self._known[structure.digest] = structure
        while len(self._known) > _MOST_KNOWN:
            del self._known[next(iter(self._known))]

    async def close(self) -> None:
        """Stop watching other agents."""
        await self._successors.close()

    def __contains__(self, name: object) -> bool:
        """Say whether ``name`` is a workflow that begins here."""
        return name in self._named

    def takes(self, request: pb.ModelInferRequest) -> bool:
        """Say whether ``request`` is for a workflow, or for a part of one."""
        return request.model_name in self._named or STAGE_PARAMETER in request.parameters

    def deadline_s(self, name: str) -> float:
        """Return the seconds that a request for the workflow ``name`` has when it does not say."""
        return self._named[name].rules.deadline_s if name in self._named else LONGEST_DEADLINE_S

    async def infer(
        self, head: RequestHead, raw: Sequence[Buffer], end_s: float, group: str | None
    ) -> pb.ModelInferResponse:
        """Run a request for a workflow, or for what begins with one of its relays.

        Args:
            head: Of the request.
            raw: Its raw contents.
            end_s: When all must have ended, on the clock.
            group: Where its first stage runs; None for any here.

        Raises:
            CallFailed: A stage got no result, or the definition that it names is not known here.
            RequestRefused: The workflow does not begin here.
            InvalidInput: The request is not one for it.
        """
        call = self._call(head, raw, end_s)
        begun_s = self._clock()
        counters = self.counters.setdefault(call.name, Counters()) if call.begin == HOME else Counters()
        try:
            outputs = await self._runner.run(call, group)
        except (CallFailed, asyncio.CancelledError) as error:
            dropped = not isinstance(error, CallFailed) or error.code in _DROPPED
            counters.dropped += dropped
            counters.failed += not dropped
            counters.failed_s += self._clock() - begun_s
            raise
        counters.completed += 1
        counters.items += 1
        counters.request_s += self._clock() - begun_s
        return encode_response(
            call.name, outputs, request_id=head.message.id, parameters={POSITION_PARAMETER: call.position}
        )

    def _call(self, head: RequestHead, raw: Sequence[Buffer], end_s: float) -> PartCall:
        message = head.message
        structure, begin = self._asked_for(message)
        stages = structure.rules.stages
        arrays = decode_raw(head.described, raw) if raw else decode_inputs(message, self._limits)
        entries = structure.hosted.get(HOME, ())
        position = parameter(message.parameters, POSITION_PARAMETER)
        if position is None:
            position = next(self._positions)
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < _MOST_POSITION:
            expected = f"a whole number of at least 0 and below {_MOST_POSITION}"
            raise InvalidInput.of(expected, field=f"parameters.{POSITION_PARAMETER}", found=repr(position))
        for name in head.wanted:
            if not any(name.startswith(f"{stage}.") for stage in stages):
                expected = f"<service>.<output> of one of {', '.join(stages)}"
                raise InvalidInput.of(expected, where=structure.rules.name, field="outputs", found=repr(name))
        values = {name: parameter(message.parameters, name) for name in _PASSED_ON}
        return PartCall(
            structure=structure,
            begin=begin,
            inputs=by_stage(arrays, stages, plain=entries[0] if len(entries) == 1 and begin == HOME else ""),
            position=position,
            end_s=end_s,
            parameters={name: value for name, value in values.items() if value is not None},
            wanted=head.wanted,
        )

    def _asked_for(self, message: pb.ModelInferRequest) -> tuple[Structure, str]:
        """Return the workflow that a request means, and where in it to begin."""
        begin = parameter(message.parameters, STAGE_PARAMETER)
        if begin is None:
            if message.model_name not in self._named:
                raise UnknownService(f"workflow {message.model_name!r} does not begin here")
            return self._named[message.model_name], HOME
        digest = str(parameter(message.parameters, DIGEST_PARAMETER))
        structure = self._known.get(digest) or self._staged(digest)
        if structure is None:
            problem = f"workflow {message.model_name!r} with digest {digest!r} is not known here"
            raise CallFailed(grpc.StatusCode.ABORTED, problem)  # no replica is to blame
        if structure.rules.name != message.model_name or begin not in structure.relays:
            expected = f"one of {', '.join(structure.relays) or 'none'}"
            raise InvalidInput.of(expected, field=f"parameters.{STAGE_PARAMETER}", found=repr(begin))
        return structure, str(begin)

    def _staged(self, digest: str) -> Structure | None:
        """Return a definition that is staged: another agent may have committed it already."""
        staged = self._node.staged
        found = [Structure.of(rules) for rules in staged.workflows] if staged else []
        return next((structure for structure in found if structure.digest == digest), None)

    async def metadata(self, name: str) -> pb.ModelMetadataResponse:
        """Return what the workflow ``name`` takes of clients, and what it may answer.

        Raises:
            RequestRefused: It does not begin here, or a stage has no replica.
            CallFailed: Another agent does not answer.
        """
        if name not in self._named:
            raise UnknownService(f"workflow {name!r} does not begin here")
        structure = self._named[name]
        stages = structure.rules.stages
        described = await asyncio.gather(*(self._stage_metadata(stage) for stage in stages))
        answer = pb.ModelMetadataResponse(name=name, versions=["1"], platform="foreplan_workflow")
        for stage, metadata in zip(stages, described, strict=True):
            handed_over = {tensor for _, edge in structure.into(stage) for tensor, _ in edge.inputs}
            for tensor in metadata.inputs:
                if tensor.name not in handed_over:
                    answer.inputs.add(name=f"{stage}.{tensor.name}", datatype=tensor.datatype, shape=tensor.shape)
            for tensor in metadata.outputs if structure.may_end(stage) else ():
                answer.outputs.add(name=f"{stage}.{tensor.name}", datatype=tensor.datatype, shape=tensor.shape)
        return answer

    async def _stage_metadata(self, stage: str) -> pb.ModelMetadataResponse:
        place = await self._successors.choose(stage)
        if place is None:
            raise ReplicaUnavailable(f"stage {stage!r}: {self._successors.problem(stage)}")
        if place.peer is None:
            return self._describe(stage, place.group)
        ask = pb.ModelMetadataRequest(name=stage).SerializeToString()
        return pb.ModelMetadataResponse.FromString(await place.peer.metadata(ask, place.group, _ASK_S))

    def _own_view(self) -> NodeView:
        """Return what gateways would know about this node, without what only reports need: every call asks."""
        upkeep = self._node.upkeep
        if self._node.drained:
            return NodeView(problem="its node is drained; `foreplan undrain` takes it back")
        return NodeView(
            replicas={
                key: "" if replica.phase is Phase.SERVING else f"it is {replica.phase.value}: {replica.reason}"
                for key, replica in upkeep.replicas.items()
            },
            waits_s={group: server.expected_wait_s() for group, server in upkeep.groups.items()},
        )
