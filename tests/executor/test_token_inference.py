"""Requests for tokens as they are read, and what becomes of one whose client does not wait for its end."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import numpy as np
import pytest

from executor.errors import Hopeless
from executor.group_server import GroupServer
from executor.lane import Generating, TokenRequest
from executor.proto import open_inference_pb2 as pb
from executor.request_head import RequestHead
from executor.runtime.protocol import GenerationFacts
from executor.state import ReplicaKey
from executor.tensors import TensorLimits, encode_request
from executor.token_inference import generated_answer, token_request
from plans.errors import InvalidInput

KEY = ReplicaKey(group="g", service="chat", variant="v")
FACTS = GenerationFacts(vocabulary=10, max_context=50, kv_bytes_per_token=1)


class Generates:
    """Takes sequences, and never ends one."""

    def __init__(self) -> None:
        self.cancelled: list[Generating] = []

    def generate(self, key: ReplicaKey, _: TokenRequest) -> Generating:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        return Generating(key=key, number=0, arrived_s=0.0, answer=answer, on_token=lambda _: None)

    def cancel_generation(self, sequence: Generating) -> None:
        self.cancelled.append(sequence)


def _whole(server: Generates, limit_s: float | None) -> asyncio.Task[Any]:
    asked = TokenRequest(prompt=(1,), new_tokens=40)
    answer = generated_answer(cast(GroupServer, server), KEY, asked, pb.ModelInferRequest(), limit_s)
    return asyncio.create_task(answer)


def test_a_client_that_gives_up_a_whole_answer_ends_its_sequence() -> None:
    async def scenario() -> None:
        server = Generates()
        call = _whole(server, None)
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert len(server.cancelled) == 1

    asyncio.run(scenario())


def test_a_whole_answer_that_does_not_come_in_time_ends_its_sequence() -> None:
    async def scenario() -> None:
        server = Generates()
        with pytest.raises(Hopeless, match="within the deadline"):
            await _whole(server, 0.001)
        assert len(server.cancelled) == 1

    asyncio.run(scenario())


def _asked(max_tokens: object) -> TokenRequest:
    inputs = {"input_ids": np.array([[1, 2]], dtype=np.int64)}
    message = encode_request("chat", inputs, parameters={"max_tokens": cast(Any, max_tokens)})
    raw = message.raw_input_contents
    return token_request(RequestHead.of(message, raw, TensorLimits()), raw, FACTS, TensorLimits())


def test_a_count_may_be_a_number_or_its_text() -> None:
    assert _asked(7) == _asked("7") == TokenRequest(prompt=(1, 2), new_tokens=7)


@pytest.mark.parametrize("count", [0, -1, "0", "-1", "seven", "", "9" * 5000, 1.5, True])
def test_a_count_that_is_no_number_of_tokens_is_refused(count: object) -> None:
    with pytest.raises(InvalidInput, match="whole number above 0"):
        _asked(count)
