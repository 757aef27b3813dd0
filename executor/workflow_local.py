"""A call of a stage on a replica of this node: from arrays to arrays, without a message in between."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

from executor.dispatcher import DEFAULT_PRIORITY
from executor.errors import RequestRefused
from executor.node import Node
from executor.request_head import RequestHead
from executor.runtime.protocol import batch_of
from executor.state import ReplicaKey
from executor.tensors import TensorLimits, decode_outputs, encode_request
from executor.token_inference import generated_answer, token_request
from executor.worker_wire import Loaded
from executor.workflow_tensors import Arrays

__all__ = ["LocalStages", "Parameters", "Stages"]

Parameters = Mapping[str, bool | int | float | str]


class Stages(Protocol):
    """Runs single calls of services on replicas of one node."""

    async def run(
        self, service: str, inputs: Arrays, group: str | None, deadline_s: float, parameters: Parameters
    ) -> Arrays:
        """Return the outputs of a call on ``group`` (None: any) that shall have ended at ``deadline_s``, on the clock.

        Raises:
            RequestRefused: It gets no result.
            InvalidInput: The inputs are not what the model takes.
        """


class LocalStages:
    """`Stages` on the groups of ``node``; tensors go through the shared memory of their workers."""

    def __init__(self, node: Node, limits: TensorLimits) -> None:
        self._node = node
        self._limits = limits

    async def run(
        self, service: str, inputs: Arrays, group: str | None, deadline_s: float, parameters: Parameters
    ) -> Arrays:
        """See `Stages.run`."""
        replica = self._node.choose(service, group)
        server = self._node.upkeep.groups[replica.key.group]
        loaded = server.worker.loaded(replica.key.variant)
        if loaded is None:
            raise RequestRefused(f"{replica.key}: its model is not loaded")
        if loaded.generates is not None and server.generates(replica.key):
            return await self._generated(replica.key, loaded, inputs, parameters)
        priority = int(parameters.get("priority", 0)) or DEFAULT_PRIORITY
        items = batch_of(inputs, loaded.inputs, max_batch=server.max_batch(replica.key), where=service)
        pending = server.submit(replica.key, inputs, items, deadline_s, priority=priority)
        try:
            return (await pending.answer).outputs
        except asyncio.CancelledError:
            server.cancel(pending)
            raise

    async def _generated(self, key: ReplicaKey, loaded: Loaded, inputs: Arrays, parameters: Parameters) -> Arrays:
        """Let ``key`` generate; its sequences go by the deadline of their first token."""
        assert loaded.generates is not None
        request = encode_request(key.service, inputs, parameters=parameters)
        raw = request.raw_input_contents
        head = RequestHead.of(request, raw, self._limits)
        asked = token_request(head, raw, loaded.generates, self._limits)
        _, response = await generated_answer(self._node.upkeep.groups[key.group], key, asked, request, None)
        return decode_outputs(response, self._limits)
