"""The agent's data plane: the Open Inference Protocol over the replicas of one node.

A model name is the name of a service. A gateway names the group in the metadata ``foreplan-group``; without it the
agent picks its least loaded replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from executor.answer_bytes import EXTENSIONS, MODEL_VERSION, AnswerWriter, answer_message
from executor.errors import PlacementIsPlanned, RequestRefused, UnknownService, details_of, shortened, status_of
from executor.forwarding import Body, CallFailed
from executor.infer_header import GROUP_METADATA, deadline_in_s
from executor.lane import Generated
from executor.model_config import model_config
from executor.node import Node
from executor.proto import open_inference_pb2 as pb
from executor.proto import open_inference_pb2_grpc as pb_grpc
from executor.replica import Replica
from executor.request_head import Fits, HeadReader, RequestHead
from executor.runtime.protocol import TensorSpec
from executor.state import Phase
from executor.statistics import Counters, statistics_to_proto
from executor.stream_inference import FINAL, INPUT, OUTPUT, failure_response, interleaved
from executor.tensors import Buffer, TensorLimits, decode_inputs, decode_raw
from executor.token_inference import generated_answer, streamed_tokens, token_request
from executor.tracing import Spans, join_trace, traceparent_in
from executor.whole_requests import Answer
from executor.worker_wire import Loaded
from executor.workflow_service import Workflows
from plans.errors import ForeplanError

__all__ = ["InferenceServicer"]

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class _Whole:
    """A request, and the raw contents of its tensors."""

    head: RequestHead
    raw: Sequence[Buffer]


class InferenceServicer(pb_grpc.GRPCInferenceServiceServicer):
    """Answers clients and gateways for one node.

    Args:
        node: The node.
        version: Of Foreplan, for ``ServerMetadata``.
        limits: What one request may hold.
        clock: The clock of the node's groups.
        spans: Records each request, with its time in queue and in batch as spans inside; None records nothing.

    Attributes:
        workflows: Those that run here, if any; may be set after the start.
    """

    def __init__(
        self,
        node: Node,
        *,
        version: str,
        limits: TensorLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        spans: Spans | None = None,
    ) -> None:
        self._spans = spans
        self._node = node
        self._version = version
        self._limits = limits or TensorLimits()
        self._heads = HeadReader(self._limits)
        self._fits = Fits()
        self._answers = AnswerWriter()
        self._clock = clock
        self.workflows: Workflows | None = None

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:  # noqa: N802
        """True: the process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:  # noqa: N802
        """True once everything that is committed serves."""
        return pb.ServerReadyResponse(ready=self._node.ready)

    async def ServerMetadata(  # noqa: N802
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Name and version of this server."""
        return pb.ServerMetadataResponse(
            name="foreplan-agent",
            version=self._version,
            extensions=EXTENSIONS,
        )

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:  # noqa: N802
        """True while a replica of the service serves; an unknown name is not ready."""
        try:
            self._chosen(request.name, request.version, None)
        except RequestRefused:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """Inputs and outputs of the service; the first dimension, of any size, is the batch."""
        try:
            if self.workflows is not None and request.name in self.workflows:
                return await self.workflows.metadata(request.name)
            return self.describe(request.name, _group_in(context), version=request.version)
        except ForeplanError as error:
            return await context.abort(status_of(error), details_of(error))
        except CallFailed as failed:
            return await context.abort(failed.code, failed.details)

    def describe(self, service: str, group: str | None, *, version: str = "") -> pb.ModelMetadataResponse:
        """Return inputs and outputs of ``service`` as its replica here has them; see `ModelMetadata`.

        Raises:
            RequestRefused: It has none that serves.
        """
        replica, loaded = self._chosen(service, version, group)
        inputs = [_metadata(spec) for spec in loaded.inputs]
        outputs = [_metadata(spec) for spec in loaded.outputs]
        if self._generates(replica):
            inputs, outputs = ([_tokens_metadata(name)] for name in (INPUT, OUTPUT))
        return pb.ModelMetadataResponse(
            name=service, versions=[MODEL_VERSION], platform="foreplan", inputs=inputs, outputs=outputs
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:  # noqa: N802
        """How requests for the service are batched, and what they hold."""
        try:
            return pb.ModelConfigResponse(config=await self._config(request, _group_in(context)))
        except ForeplanError as error:
            return await context.abort(status_of(error), details_of(error))
        except CallFailed as failed:
            return await context.abort(failed.code, failed.details)

    async def _config(self, request: pb.ModelConfigRequest, group: str | None) -> pb.ModelConfig:
        if self.workflows is not None and request.name in self.workflows:
            return model_config(await self.workflows.metadata(request.name), max_batch=1)
        replica, _ = self._chosen(request.name, request.version, group)
        described = self.describe(request.name, replica.key.group, version=request.version)
        if self._generates(replica):
            return model_config(described, max_batch=0)
        return model_config(described, self._node.upkeep.groups[replica.key.group].max_batch(replica.key))

    async def RepositoryIndex(  # noqa: N802
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        """Every service of the node with its state, and why it is not ready."""
        services = dict.fromkeys(key.service for key in self._node.upkeep.replicas)
        index = [self._index_of(service) for service in services]
        ready = [one for one in index if one.state == "READY" or not request.ready]
        return pb.RepositoryIndexResponse(models=ready)

    async def RepositoryModelLoad(  # noqa: N802
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Do nothing for a service that is ready; anything else takes a plan."""
        try:
            self._chosen(request.model_name, "", None)
        except RequestRefused as error:
            problem = f"{error}; placement follows the plan: change it and run `foreplan apply`"
            return await context.abort(status_of(PlacementIsPlanned()), shortened(problem))
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(  # noqa: N802
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Refuse: what runs here follows the plan."""
        problem = (
            f"{request.model_name!r} is not unloaded by clients: leave it out of the plan and run `foreplan apply`"
        )
        return await context.abort(status_of(PlacementIsPlanned()), shortened(problem))

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:  # noqa: N802
        """Run one request, batched with others where that serves all deadlines."""
        arrived_s = self._clock()
        if self._spans is not None:
            join_trace(traceparent_in(context))
        try:
            raw = request.raw_input_contents
            whole = _Whole(RequestHead.of(request, raw, self._limits), raw)
            answer = await self._recorded(whole, arrived_s, context.time_remaining(), _group_in(context))
            return answer_message(whole.head, answer) if isinstance(answer, Answer) else answer
        except ForeplanError as error:
            return await context.abort(status_of(error), details_of(error))
        except CallFailed as failed:
            return await context.abort(failed.code, failed.details)

    async def ModelStreamInfer(  # noqa: N802
        self, request_iterator: AsyncIterable[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Answer requests side by side: of a service that generates token by token, of others at once."""
        group = _group_in(context)
        answers = interleaved(
            request_iterator,
            lambda request: self._streamed(request, group, context.time_remaining()),
            failure=failure_response,
            size_bytes=pb.ModelStreamInferResponse.ByteSize,
            around=lambda request: self._traced(request.model_name, group, context),
        )
        async with contextlib.aclosing(answers):
            async for answer in answers:
                yield answer

    @contextlib.contextmanager
    def _traced(self, service: str, group: str | None, context: Context | None = None) -> Iterator[None]:
        """Record what is done for one request, where spans are recorded, inside the caller's span."""
        if self._spans is None:
            yield
            return
        if context is not None:
            join_trace(traceparent_in(context))
        with self._spans.span("agent.infer", service=service, group=group or ""):
            yield

    async def _streamed(
        self, request: pb.ModelInferRequest, group: str | None, time_remaining_s: float | None
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        arrived_s, raw = self._clock(), request.raw_input_contents
        whole = _Whole(RequestHead.of(request, raw, self._limits), raw)
        of_workflow = self.workflows is not None and self.workflows.takes(request)
        replica, loaded = (
            (None, None) if of_workflow else self._chosen(request.model_name, request.model_version, group)
        )
        if replica is None or loaded is None or loaded.generates is None or not self._generates(replica):
            found = await self._infer(whole, arrived_s, time_remaining_s, group)
            answer = answer_message(whole.head, found) if isinstance(found, Answer) else found
            answer.parameters[FINAL].bool_param = True
            yield pb.ModelStreamInferResponse(infer_response=answer)
            return
        asked = token_request(whole.head, raw, loaded.generates, self._limits)
        server = self._node.upkeep.groups[replica.key.group]
        parts = streamed_tokens(server, replica.key, asked, request, whole.head.deadline_s)
        async with contextlib.aclosing(parts):
            async for part in parts:
                yield part

    def _generates(self, replica: Replica) -> bool:
        return self._node.upkeep.groups[replica.key.group].generates(replica.key)

    async def forwarded(self, body: Body, group: str, timeout_s: float) -> bytes:
        """Run a serialised ``ModelInferRequest`` on ``group``, and return the serialised answer.

        Raises:
            RequestRefused: It gets no result.
            CallFailed: A stage of a workflow got none.
            InvalidInput: It is no such message, or not one that the model takes.
        """
        arrived_s = self._clock()
        whole = _Whole(*self._heads.read(body))
        answer = await self._recorded(whole, arrived_s, timeout_s, group)
        return self._answers.write(whole.head, answer) if isinstance(answer, Answer) else answer.SerializeToString()

    def wait_s(self, group: str) -> float:
        """Return the seconds until a request that arrives at ``group`` now would start; 0 for a group not here."""
        server = self._node.upkeep.groups.get(group)
        return server.expected_wait_s() if server else 0.0

    async def ModelStatistics(  # noqa: N802
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        """What became of the requests of a service, or of every service, since the agent started."""
        counters = self.counters()
        if request.version not in ("", MODEL_VERSION):
            counters = {}
        if request.name:
            counters = {name: found for name, found in counters.items() if name == request.name}
            if not counters:
                problem = f"service {request.name!r} does not run on node {self._node.settings.node!r}"
                return await context.abort(grpc.StatusCode.NOT_FOUND, shortened(problem))
        return pb.ModelStatisticsResponse(
            model_stats=[statistics_to_proto(name, MODEL_VERSION, found) for name, found in counters.items()]
        )

    def counters(self) -> dict[str, list[Counters]]:
        """Return the counters of every replica that is or was here, by service: what is counted never falls."""
        found = {service: [departed] for service, departed in self._node.upkeep.departed.items()}
        for key in self._node.upkeep.replicas:
            server = self._node.upkeep.groups.get(key.group)
            if server is not None and key in server.counters:
                found.setdefault(key.service, []).append(server.counters[key])
        if self.workflows is not None:
            found |= {name: [counters] for name, counters in self.workflows.counters.items()}
        return found

    async def _recorded(
        self, whole: _Whole, arrived_s: float, time_remaining_s: float | None, group: str | None
    ) -> Answer | pb.ModelInferResponse:
        if self._spans is None:
            return await self._infer(whole, arrived_s, time_remaining_s, group)
        with self._traced(whole.head.message.model_name, group):
            return await self._infer(whole, arrived_s, time_remaining_s, group)

    def _record(self, answer: Answer | Generated) -> None:
        """Record where the time of a request went, by what its answer says."""
        if self._spans is not None:
            now_s = time.time()
            started_s = now_s - answer.run_s
            self._spans.record("agent.queue", started_s - answer.queue_s, started_s)
            self._spans.record("agent.batch", started_s, now_s, variant=answer.variant, batch_size=answer.batch_items)

    async def _infer(
        self, whole: _Whole, arrived_s: float, time_remaining_s: float | None, group: str | None
    ) -> Answer | pb.ModelInferResponse:
        """Return the outputs of a request, or the whole message where these are not a model's own."""
        head = whole.head
        request = head.message
        if self.workflows is not None and self.workflows.takes(request):
            default_s = self.workflows.deadline_s(request.model_name)
            end_s = arrived_s + deadline_in_s(head.deadline_s, time_remaining_s, default_s)
            return await self.workflows.infer(head, whole.raw, end_s, group)
        replica, loaded = self._chosen(request.model_name, request.model_version, group)
        if loaded.generates is not None and self._generates(replica):
            asked = token_request(head, whole.raw, loaded.generates, self._limits)
            server = self._node.upkeep.groups[replica.key.group]
            generated, response = await generated_answer(server, replica.key, asked, request, head.deadline_s)
            self._record(generated)
            return response
        server = self._node.upkeep.groups[replica.key.group]
        items = self._fits.items(head, loaded, server.max_batch(replica.key))
        inputs = decode_raw(head.described, whole.raw) if whole.raw else decode_inputs(request, self._limits)
        deadline_s = arrived_s + deadline_in_s(head.deadline_s, time_remaining_s, replica.settings.deadline_s)
        pending = server.submit(replica.key, inputs, items, deadline_s, priority=head.priority, stream=head.stream)
        try:
            answer = await pending.answer
        except asyncio.CancelledError:  # the client gave up, or its deadline passed
            server.cancel(pending)
            raise
        self._record(answer)
        return answer

    def _chosen(self, service: str, version: str, group: str | None) -> tuple[Replica, Loaded]:
        """Return the replica for a request, and what its worker said when it loaded the model."""
        if version not in ("", MODEL_VERSION):
            raise UnknownService(f"service {service!r} has version {MODEL_VERSION} only, not {version!r}")
        replica = self._node.choose(service, group)
        loaded = self._node.upkeep.groups[replica.key.group].worker.loaded(replica.key.variant)
        if loaded is None:
            raise RequestRefused(f"{replica.key}: its model is not loaded")
        return replica, loaded

    def _index_of(self, service: str) -> pb.RepositoryIndexResponse.ModelIndex:
        mine = [replica for replica in self._node.upkeep.replicas.values() if replica.key.service == service]
        phases = {replica.phase for replica in mine}
        if Phase.SERVING in phases:
            return pb.RepositoryIndexResponse.ModelIndex(name=service, version=MODEL_VERSION, state="READY")
        state = "LOADING" if phases & {Phase.LOADING, Phase.STAGED} else "UNAVAILABLE"
        reason = "; ".join(f"{replica.phase.value} {replica.reason}".strip() for replica in mine)
        return pb.RepositoryIndexResponse.ModelIndex(name=service, version=MODEL_VERSION, state=state, reason=reason)


def _group_in(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == GROUP_METADATA:
            return value if isinstance(value, str) else value.decode(errors="replace")
    return None


def _tokens_metadata(name: str) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=name, datatype="INT64", shape=[1, -1])


def _metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=[-1, *spec.shape])
