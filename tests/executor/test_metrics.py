from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from executor.gateway import GatewayConfig, running_gateway
from executor.metrics import BOUNDS_S, Durations, exposition
from executor.proto import open_inference_pb2 as inference
from executor.statistics import Counters, add_statistics, statistics_to_proto
from tests.executor.running_agent import desired, replica, running_agent
from tests.executor.test_gateway import Door, agents, table
from tests.free_port import free_port


async def scraped(address: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the samples at ``address`` by name and labels."""
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics") as answer:
        assert answer.status == 200
        text = await answer.text()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_gateway_counts_how_requests_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        metrics = f"127.0.0.1:{free_port()}"
        config = GatewayConfig(listen="127.0.0.1:0", state_dir=tmp_path, metrics=metrics)
        async with agents("a", "b") as (a, b), running_gateway(config) as address:
            door = Door.to(address)
            await door.code(door.infer("chat"))
            await door.control.set_routes(table(a, b), timeout_s=5)
            for number in range(3):
                await door.code(door.infer(f"nobody-{number}"))
            malformed = door.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", bytes, bytes)
            await door.code(malformed(b"\xff"))
            await door.infer()
            await door.infer()
            a.infer_status = grpc.StatusCode.UNAVAILABLE
            await door.infer()
            b.infer_status = grpc.StatusCode.INVALID_ARGUMENT
            await door.code(door.infer())
            found = await scraped(metrics)
            code = (("code", "OK"), ("service", "chat"))
            assert found["executor_gateway_requests_total", code] == 3
            code = (("code", "INVALID_ARGUMENT"), ("service", "chat"))
            assert found["executor_gateway_requests_total", code] == 1
            refused = {key: count for key, count in found.items() if ("service", "") in key[1]}
            assert refused == {
                ("executor_gateway_requests_total", (("code", "NOT_FOUND"), ("service", ""))): 4,
                ("executor_gateway_requests_total", (("code", "INVALID_ARGUMENT"), ("service", ""))): 1,
            }, "a client's names are endless"
            assert found["executor_gateway_request_seconds_count", (("service", "chat"),)] == 4
            assert found["executor_gateway_retries_total", (("service", "chat"),)] == 1
            assert found["executor_gateway_generation", ()] == 1
            assert found["executor_gateway_requests_in_flight", ()] == 0
            await door.channel.close()

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_an_agent_counts_by_tritons_names_and_tells_statistics(tmp_path: Path) -> None:
    async def scenario() -> None:
        metrics = f"127.0.0.1:{free_port()}"
        async with running_agent(tmp_path, metrics=metrics) as agent:
            await agent.apply(desired(1, g0=[replica("chat")]))
            for _ in range(3):
                await agent.infer("chat")
            found = await scraped(metrics)
            service = (("model", "chat"), ("version", "1"))
            assert found["nv_inference_request_success", service] == 3
            assert found["nv_inference_count", service] == 3
            assert 1 <= found["nv_inference_exec_count", service] <= 3
            assert found["nv_inference_request_duration_us", service] > 0
            assert found["executor_agent_ready", ()] == 1
            assert found["executor_resident_bytes", ()] > 2**20
            key = (("group", "node-a/0"), ("model", "fake-double"), ("phase", "serving"), ("service", "chat"))
            assert found["executor_replica_phase", key] == 1
            assert not any(name.startswith("nv_gpu") for name, _ in found), "a CPU node has no GPU to tell of"
            answer = await agent.inference.ModelStatistics(inference.ModelStatisticsRequest(name="chat"))
            (one,) = answer.model_stats
            assert (one.inference_count, one.inference_stats.success.count) == (3, 3)
            assert sum(batch.compute_infer.count for batch in one.batch_stats) == one.execution_count
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await agent.inference.ModelStatistics(inference.ModelStatisticsRequest(name="nobody"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(asyncio.wait_for(scenario(), 120))


@given(st.lists(st.floats(0, 100), max_size=50))
def test_law_buckets_are_cumulative_and_end_with_everything(values: list[float]) -> None:
    durations = Durations()
    for value in values:
        durations.add(value)
    buckets = durations.buckets()
    assert buckets[-1] == ("+Inf", len(values))
    for bound, count in buckets[:-1]:
        assert count == sum(value <= float(bound) for value in values)
    assert [float(bound) for bound, _ in buckets[:-1]] == list(BOUNDS_S)


def test_statistics_of_several_agents_add_up() -> None:
    one, other = Counters(completed=2, items=5, request_s=0.5), Counters(completed=1, items=1, failed=1, failed_s=0.1)
    one.ran(5, 0.2, 7)
    other.ran(1, 0.1, 9)
    together = statistics_to_proto("m", "1", [one, other])
    apart = [
        inference.ModelStatisticsResponse(model_stats=[statistics_to_proto("m", "1", [each])]) for each in (one, other)
    ]
    (added,) = add_statistics(["m"], apart).model_stats
    assert added == together
    assert (added.inference_count, added.execution_count, added.last_inference) == (6, 2, 9)
    assert [batch.batch_size for batch in added.batch_stats] == [1, 5]
    assert add_statistics(["other"], apart).model_stats[0].inference_count == 0


def test_the_exposition_has_what_the_process_uses() -> None:
    assert b"process_resident_memory_bytes" in exposition(iter(()))
