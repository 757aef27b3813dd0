"""A group of two devices serves over both: sharded, or as a pipeline whose next batch does not wait for the last."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from executor.errors import ReplicaUnavailable, WorkerRefused
from executor.group_server import GroupServer
from executor.lane import TokenRequest
from executor.runtime.torch_runtime import TorchRuntime
from executor.state import GenerationRules, ReplicaKey
from executor.worker_link import WorkerSettings
from tests.executor.running_agent import replica, worker_processes

NAME = "llama-tiny"
KEY = ReplicaKey(group="n/0-1", service="chat", variant=NAME)
CHAT = ReplicaKey(group="n/0-1", service="talk", variant=NAME)
PROMPT = (3, 1, 4, 1, 5)
LONG = 60
"""Tokens of an answer that begins in one shape and ends in another."""
WAIT_S = 120.0


def scenario(act):
    async def run():
        lost = []
        made = GroupServer("n/0-1", (0, 1), WorkerSettings(log_level="CRITICAL"), lost.append)
        try:
            await made.start_worker(None)
            return await act(made, lost)
        finally:
            await made.stop_worker()
            assert worker_processes() == []

    return asyncio.run(run())


async def serve(made, shape):
    made.configure(KEY, replica("chat", NAME, max_batch=2, batch_latency_s=(0.01, 0.01), shape=shape))
    await made.worker.load(NAME, 2, (5, 5), shape)


async def generated_by(made, shape, beside):
    """Serve the model over both devices in this shape, and return what it generates while requests are answered."""
    rules = GenerationRules(ttft_s=WAIT_S, tpot_s=WAIT_S, kv_bytes=2**20)
    latency_s = (0.01, 0.01)
    made.configure(CHAT, replica("talk", NAME, max_batch=2, batch_latency_s=latency_s, shape=shape, generation=rules))
    await made.worker.load(NAME, 2, (5, 5), shape, kv_bytes=2**20)
    assert made.generates(CHAT)
    answers = [ask(made, each) for each in beside]
    generated = made.generate(CHAT, TokenRequest(prompt=PROMPT, new_tokens=5)).answer
    await asyncio.wait_for(asyncio.gather(*answers), WAIT_S)
    return (await asyncio.wait_for(generated, WAIT_S)).tokens


def ask(made, inputs):
    return made.submit(KEY, inputs, 1, made._clock() + WAIT_S).answer


def test_answers_are_those_of_one_device_in_either_shape_and_a_lost_rank_is_a_lost_worker():
    single = TorchRuntime().load(NAME, 2)
    inputs = [single.example(1, seed) for seed in range(6)]
    wanted = [single.run(each)["logits"] for each in inputs]
    sequences = single.sequences(64)
    wanted_tokens = (*sequences.prefill([(1, PROMPT)]), *(sequences.decode([1])[0] for _ in range(LONG - 1)))

    weights, longer = set(), []

    async def act(made, lost):
        with pytest.raises(WorkerRefused, match="tp x pp = 2 devices"):
            await made.worker.load(NAME, 2, (5, 5), (1, 1))
        for shape in ((2, 1), (1, 2)):
            await serve(made, shape)
            answers = await asyncio.wait_for(asyncio.gather(*(ask(made, each) for each in inputs)), WAIT_S)
            for answer, logits in zip(answers, wanted, strict=True):
                np.testing.assert_allclose(answer.outputs["logits"], logits, rtol=1e-4, atol=1e-5)
            weights.add(made.worker.loaded(NAME).weight_bytes)
            assert await generated_by(made, shape, inputs) == wanted_tokens[:5]
            longer.append(made.generate(CHAT, TokenRequest(prompt=PROMPT, new_tokens=LONG)).answer)
        assert len(weights) == 2  # it is the shape that was asked for
        for answer in await asyncio.wait_for(asyncio.gather(*longer), WAIT_S):
            assert answer.tokens == wanted_tokens
        assert made.running(KEY) == made.queued(KEY) == 0
        (rank,) = [child for worker in worker_processes() for child in worker.children()]
        rank.kill()
        for answer in (made.generate(CHAT, TokenRequest(prompt=PROMPT, new_tokens=5)).answer, ask(made, inputs[0])):
            with pytest.raises(ReplicaUnavailable, match="the worker ended"):
                await asyncio.wait_for(answer, WAIT_S)
        assert len(lost) == 1

    scenario(act)
