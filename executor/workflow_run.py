"""Runs workflows on an agent: its own stages, and what follows them, here or handed straight to other agents.

A call of part of a workflow is a ``ModelInferRequest`` for the workflow, as a client makes it, with three parameters:
``workflow_stage`` says with which stage to begin, ``workflow_digest`` which definition is meant, and
``workflow_position`` numbers the request, so that every agent draws the same. A stage that nothing here follows is a
plain call of its service. docs/executor.md says what becomes of failures.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import grpc
from google.protobuf.message import DecodeError

from executor.errors import details_of, status_of
from executor.first_tries import GivenUp
from executor.forwarding import CallFailed
from executor.proto import open_inference_pb2 as pb
from executor.tensors import Array, TensorLimits, decode_outputs, encode_request
from executor.tracing import NoSpans
from executor.workflow import DIGEST_PARAMETER, HOME, POSITION_PARAMETER, STAGE_PARAMETER, Progress, Release, Structure
from executor.workflow_local import Parameters, Stages
from executor.workflow_routes import Place, Successors
from executor.workflow_tensors import Arrays, gathered, inputs_of, qualified
from plans.errors import ForeplanError, InvalidInput

__all__ = ["PartCall", "WorkflowRunner"]

_MOST_CALLS = 256
"""Calls of one stage of one request."""

_Code = grpc.StatusCode


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCall:
    """A request for a workflow, or for what begins with one of its relays.

    Attributes:
        structure: The workflow.
        begin: The relay, or `HOME`.
        inputs: What the client has sent along, or was handed over, by stage.
        position: Numbers the request.
        end_s: When all of it must have ended, on the clock.
        parameters: That stages are told of: priority, and what is asked of services that generate.
        wanted: Names of the outputs asked for; none for all.
    """

    structure: Structure
    begin: str
    inputs: Mapping[str, Arrays]
    position: int
    end_s: float
    parameters: Parameters
    wanted: frozenset[str]

    @property
    def name(self) -> str:
        """The name of the workflow."""
        return self.structure.rules.name


class WorkflowRunner:
    """Runs `PartCall` s.

    Args:
        stages: Runs single calls here.
        successors: Finds replicas for all others.
        limits: What one answer may hold.
        clock: The time in seconds.
        spans: Records every call of a stage; None records nothing.
    """

    def __init__(
        self,
        stages: Stages,
        successors: Successors,
        limits: TensorLimits,
        clock: Callable[[], float],
        spans: NoSpans | None = None,
    ) -> None:
        self._stages = stages
        self._successors = successors
        self._limits = limits
        self._clock = clock
        self._spans = spans or NoSpans()

    async def run(self, call: PartCall, group: str | None) -> dict[str, Array]:
        """Return the outputs of the stages that end the workflow, by qualified name.

        Args:
            call: What to run.
            group: Where its first stage runs.

        Raises:
            CallFailed: A stage got no result; the details name it. ABORTED says that a stage after the first was not
                available, so that nobody looks for another replica of the first.
        """
        own: Arrays = {}
        if call.begin != HOME:
            own = await self._here(call, call.begin, call.inputs.get(call.begin, {}), group)
        part = _Part(self, call, group)
        return dict(await part.run(own))

    async def call_stage(
        self, call: PartCall, stage: str, inputs: Arrays, *, at: str | None = None, first: bool = False
    ) -> Arrays:
        """Return what one call of ``stage`` gives: of a relay the answer of its whole part, else its own outputs.

        Args:
            call: Of what it is a part.
            stage: The stage.
            inputs: Its inputs.
            at: The group on this node that shall run it, when ``first``.
            first: Whether it is the stage for which the request was sent here.

        Raises:
            CallFailed: It got no result.
        """
        if first:
            return await self._at(call, stage, inputs, at, None)
        failed: CallFailed | None = None
        without = ""
        for is_last_try in (False, True):
            place = await self._successors.choose(stage, without=without)
            if place is None or self._clock() >= call.end_s:
                break
            may_hang = place.peer is not None and not is_last_try
            first_try = self._successors.first_tries.at(place.node, stage)
            try:
                with first_try if may_hang else contextlib.nullcontext():
                    return await self._at(call, stage, inputs, place.group, place)
            except GivenUp as error:
                failed = _failed(call, stage, error.code, error.details)
                without = place.group
            except CallFailed as error:
                failed = error
                if error.code is not _Code.UNAVAILABLE:
                    break
                self._successors.suspect(stage, place, f"it answered UNAVAILABLE: {error.details}")
                without = place.group
        raise failed or self._no_replica(call, stage)

    def _no_replica(self, call: PartCall, stage: str) -> CallFailed:
        if self._clock() >= call.end_s:
            return _failed(call, stage, _Code.DEADLINE_EXCEEDED, "no time left when its turn came")
        problem = f"no replica can take requests: {self._successors.problem(stage)}"
        return _failed(call, stage, _Code.UNAVAILABLE, problem)

    async def _at(self, call: PartCall, stage: str, inputs: Arrays, group: str | None, place: Place | None) -> Arrays:
        """Run one call at a place, here or at another agent."""
        with self._spans.span("workflow.stage", workflow=call.name, service=stage, group=group or ""):
            if stage in call.structure.relays:
                part = replace(call, begin=stage, inputs={**call.inputs, stage: inputs})
                if place is None or place.peer is None:
                    return await self.run(part, group)
                return await self._sent(part, stage, _part_request(part), place, call.end_s)
            if place is None or place.peer is None:
                return await self._here(call, stage, inputs, group)
            wanted = () if call.structure.may_end(stage) else _handed_over(call.structure, stage)
            request = encode_request(stage, inputs, parameters=call.parameters, outputs=wanted)
            return await self._sent(call, stage, request, place, call.end_s - call.structure.tail_s(stage))

    async def _here(self, call: PartCall, stage: str, inputs: Arrays, group: str | None) -> Arrays:
        deadline_s = call.end_s - call.structure.tail_s(stage)
        try:
            return await self._stages.run(stage, inputs, group, deadline_s, call.parameters)
        except ForeplanError as error:
            raise _failed(call, stage, status_of(error), details_of(error)) from error

    async def _sent(
        self, call: PartCall, stage: str, request: pb.ModelInferRequest, place: Place, deadline_s: float
    ) -> Arrays:
        """Return the answer of another agent."""
        assert place.peer is not None
        left_s = deadline_s - self._clock()
        if left_s <= 0:
            raise _failed(call, stage, _Code.DEADLINE_EXCEEDED, "no time left when its turn came")
        try:
            answer = await place.peer.infer(request.SerializeToString(), place.group, left_s)
            return decode_outputs(pb.ModelInferResponse.FromString(answer), self._limits)
        except CallFailed as error:
            raise _failed(call, stage, error.code, error.details) from error
        except (DecodeError, InvalidInput) as error:
            raise _failed(call, stage, _Code.INTERNAL, f"its answer cannot be read: {error}") from error


class _Part:
    """What one agent calls for one request."""

    def __init__(self, runner: WorkflowRunner, call: PartCall, group: str | None) -> None:
        self._runner = runner
        self._call = call
        self._group = group
        self._progress = Progress(call.structure, call.begin, call.position)
        self._outputs: dict[str, list[Arrays | None]] = {}
        self._running: dict[asyncio.Task[Arrays], tuple[str, int]] = {}

    async def run(self, own: Arrays) -> Arrays:
        """Return the outputs of the stages that end the workflow, by qualified name."""
        try:
            if self._call.begin != HOME:
                self._outputs[self._call.begin] = [own]
            self._start(self._progress.begin(self._rows_of(self._call.begin)))
            while not self._progress.is_over:
                done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=self._running.__getitem__):
                    self._ended(task)
            return self._answer(own)
        except InvalidInput as error:
            raise CallFailed(_Code.INVALID_ARGUMENT, f"workflow {self._call.name!r}: {details_of(error)}") from error
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    def _start(self, releases: Sequence[Release]) -> None:
        for release in releases:
            stage = release.stage
            if release.calls > _MOST_CALLS:
                expected = f"at most {_MOST_CALLS} calls of a stage"
                raise InvalidInput.of(expected, field=f"stage {stage!r}", found=release.calls)
            inputs = inputs_of(self._call.structure, release, self._call.inputs.get(stage, {}), self._outputs)
            self._outputs[stage] = [None] * release.calls
            for number, arrays in enumerate(inputs):
                first = self._is_first(stage)
                called = self._runner.call_stage(self._call, stage, arrays, at=self._group, first=first)
                self._running[asyncio.create_task(called)] = stage, number

    def _is_first(self, stage: str) -> bool:
        return self._call.begin == HOME and stage == self._call.structure.rules.stages[0]

    def _ended(self, task: asyncio.Task[Arrays]) -> None:
        stage, number = self._running.pop(task)
        try:
            self._outputs[stage][number] = task.result()
        except CallFailed as failed:
            if not self._progress.call_lost(stage):
                return
            if failed.code is _Code.UNAVAILABLE and not self._is_first(stage):
                raise CallFailed(_Code.ABORTED, failed.details) from failed
            raise
        self._start(self._progress.call_done(stage, number, self._rows_of(stage)))

    def _rows_of(self, stage: str) -> Callable[[str], int]:
        def rows(output: str) -> int:
            found = [arrays.get(output) for arrays in self._outputs[stage] if arrays is not None]
            return sum(len(array) for array in found if array is not None)

        return rows

    def _answer(self, own: Arrays) -> Arrays:
        call = self._call
        answer: dict[str, Array] = {}
        for stage in self._progress.ends:
            arrays = gathered(stage, self._outputs[stage])
            answer |= arrays if stage in call.structure.relays else qualified(stage, arrays)
        if call.begin != HOME and self._progress.ends_with_host:
            answer |= qualified(call.begin, own)
        return {name: array for name, array in answer.items() if not call.wanted or name in call.wanted}


def _part_request(part: PartCall) -> pb.ModelInferRequest:
    """Return the request that asks another agent for ``part``."""
    arrays: dict[str, Array] = {}
    for stage, inputs in part.inputs.items():
        if stage == part.begin or stage in part.structure.behind[part.begin]:
            arrays |= qualified(stage, inputs)
    parameters = {
        **part.parameters,
        STAGE_PARAMETER: part.begin,
        DIGEST_PARAMETER: part.structure.digest,
        POSITION_PARAMETER: part.position,
    }
    return encode_request(part.name, arrays, parameters=parameters, outputs=sorted(part.wanted))


def _handed_over(structure: Structure, stage: str) -> list[str]:
    """Return the outputs of ``stage`` that are needed behind it; all of them where that is none."""
    return sorted({output for _, edge in structure.out_of(stage) for _, output in edge.inputs})


def _failed(call: PartCall, stage: str, code: grpc.StatusCode, details: str) -> CallFailed:
    """Return the failure of a stage by name, once: one that comes from further behind has another's already."""
    mark = f"workflow {call.name!r}"
    return CallFailed(code, details if details.startswith(mark) else f"{mark}: stage {stage!r}: {details}")
