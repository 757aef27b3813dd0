"""Two models that one device cannot hold together, on an agent with workers of the torch runtime."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from executor.agent import AgentConfig
from executor.tensors import encode_request
from plans.errors import InvalidInput
from tests.executor.running_agent import WAIT_S, desired, replica, running_agent
from tests.executor.test_metrics import scraped
from tests.free_port import free_port

TORCH: dict[str, Any] = {
    "runtime": "executor.runtime.group_runtime:TorchGroupRuntime",
    "memory_bytes": 20_000_000,
    "host_cache_bytes": 2**30,
    "spare_worker": True,
}
# 17.6 and 6.8 MB of weights
BERT = replica("text", "bert-tiny-16", max_batch=2, memory_bytes=(18_000_000,))
MOBILE = replica("image", "mobilenet-v2-0.35", max_batch=2, memory_bytes=(7_000_000,))


async def infer(agent: Any, service: str) -> Any:
    inputs: dict[str, Any] = {
        "text": {"input_ids": np.ones((1, 16), np.int64)},
        "image": {"pixel_values": np.ones((1, 3, 224, 224), np.float32)},
    }[service]
    return await agent.inference.ModelInfer(encode_request(service, inputs), timeout=WAIT_S)


def test_services_of_one_group_take_turns_on_the_device(tmp_path: Path) -> None:
    async def scenario() -> None:
        metrics = f"127.0.0.1:{free_port()}"
        async with running_agent(tmp_path, swap_models=True, metrics=metrics, **TORCH) as agent:
            await agent.apply(desired(1, g0=[BERT, MOBILE]))
            answers = [(await infer(agent, service)).raw_output_contents for service in ("text", "image") * 3]
            assert answers[0] == answers[2] == answers[4]
            assert answers[1] == answers[3] == answers[5]
            states = [await agent.replica(service) for service in ("text", "image")]
            assert [state.completed for state in states if state] == [3, 3]
            found = await scraped(metrics)
            for service in ("text", "image"):
                labels = (("model", service), ("version", "1"))
                assert 2 <= found["executor_model_swaps_total", labels] <= 3  # the model loaded last is there at first
                assert found["executor_model_swap_seconds_total", labels] > 0

    asyncio.run(scenario())


def test_swapping_takes_a_host_cache(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "node": "a",
        "address": "127.0.0.1:0",
        "device_count": 1,
        "memory_bytes": 1,
        "state_dir": tmp_path,
        "swap_models": True,
    }
    with pytest.raises(InvalidInput, match="host cache"):
        AgentConfig(**settings)
    with pytest.raises(InvalidInput, match="host cache"):
        AgentConfig(**settings, host_cache_bytes=1, compiled=True)
