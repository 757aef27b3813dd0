from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from executor.agent_metrics import agent_metrics
from executor.device_memory import DeviceReading
from executor.gateway import GatewayConfig, running_gateway
from executor.metrics import BOUNDS_S, Durations, exposition
from executor.proto import open_inference_pb2 as inference
from executor.state import AgentState
from executor.statistics import Counters, add_statistics, statistics_to_proto
from tests.executor.front_door import Door, agents, table
from tests.executor.running_agent import desired, eventually, replica, running_agent
from tests.free_port import free_port


async def scraped(address: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the samples at ``address`` by name and labels; as they are written, where the parser renames counters."""
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics") as answer:
        assert answer.status == 200
        text = await answer.text()
    return {
        (_written(sample.name), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _written(name: str) -> str:
    return name.removesuffix("_total") if name.startswith("nv_") else name


def _counted(completed: int, seconds: float, items: int) -> Counters:
    counters = Counters(completed=completed, items=completed, request_s=seconds)
    counters.ran(items, seconds, completed)
    counters.generated(items, items, seconds, seconds)
    return counters


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
            for part in ("input", "infer", "output"):
                assert found[f"nv_inference_compute_{part}_duration_us", service] > 0
            assert ("executor_generation_tokens_total", service) not in found
            assert found["executor_agent_ready", ()] == 1
            assert found["executor_resident_bytes", ()] > 2**20
            key = (("group", "node-a/0"), ("model", "fake-double"), ("phase", "serving"), ("service", "chat"))
            assert found["executor_replica_phase", key] == 1
            assert not any(name.startswith("nv_gpu") for name, _ in found), "a CPU node has no GPU to tell of"
            answer = await agent.inference.ModelStatistics(inference.ModelStatisticsRequest(name="chat"))
            (one,) = answer.model_stats
            assert (one.inference_count, one.inference_stats.success.count) == (3, 3)
            assert one.inference_stats.compute_input.ns > 0
            assert one.inference_stats.compute_output.count == one.execution_count
            assert sum(batch.compute_infer.count for batch in one.batch_stats) == one.execution_count
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await agent.inference.ModelStatistics(inference.ModelStatisticsRequest(name="nobody"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_what_an_agent_counts_never_falls_when_replicas_come_and_go(tmp_path: Path) -> None:
    async def scenario() -> None:
        metrics = f"127.0.0.1:{free_port()}"
        async with running_agent(tmp_path, metrics=metrics) as agent:
            answered = ("nv_inference_request_success", (("model", "chat"), ("version", "1")))
            plans = (
                desired(1, g0=[replica("chat")]),
                desired(2, g1=[replica("chat")]),
                desired(3, g0=[replica("chat")]),
            )
            for done, plan in enumerate(plans, start=1):
                await agent.apply(plan)
                await agent.infer("chat")

                async def only_this() -> bool:
                    return len((await agent.state()).replicas) == 1

                await eventually(only_this)
                assert (await scraped(metrics))[answered] == done
                told = await agent.inference.ModelStatistics(inference.ModelStatisticsRequest(name="chat"))
                assert [one.inference_count for one in told.model_stats] == [done]
            await agent.apply(desired(4))
            told = await agent.inference.ModelStatistics(inference.ModelStatisticsRequest())
            assert [(one.name, one.inference_count) for one in told.model_stats] == [("chat", len(plans))]

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_devices_and_generated_tokens_are_told_where_there_are_any() -> None:
    counters = Counters()
    counters.generated(prompt_tokens=7, output_tokens=3, ttft_s=0.04, tpot_s=0.003)
    counters.generated(prompt_tokens=1, output_tokens=1, ttft_s=0.2, tpot_s=0.0)
    devices = (
        DeviceReading(used_bytes=1, total_bytes=2, utilisation=0.5, power_w=75.5),
        DeviceReading(used_bytes=1, total_bytes=2, utilisation=0.5),
    )
    state = AgentState(node="a", version="1")
    families = list(agent_metrics(state, {"chat": [counters], "see": [Counters()]}, devices))
    found = {(sample.name, tuple(sample.labels.values())): sample.value for one in families for sample in one.samples}
    chat = ("chat", "1")
    assert found["executor_prompt_tokens_total", chat] == 8
    assert found["executor_generation_tokens_total", chat] == 4
    assert found["executor_time_to_first_token_seconds_count", chat] == 2
    assert found["executor_time_to_first_token_seconds_bucket", (*chat, "0.05")] == 1
    assert found["executor_time_per_output_token_seconds_count", chat] == 1
    assert ("executor_prompt_tokens_total", ("see", "1")) not in found
    assert found["nv_gpu_power_usage", ("0",)] == 75.5
    assert ("nv_gpu_power_usage", ("1",)) not in found


@given(st.lists(st.builds(_counted, st.integers(0, 9), st.floats(0, 9), st.integers(1, 3)), max_size=4))
def test_law_counters_added_up_are_told_as_they_are_told_apart(parts: list[Counters]) -> None:
    total = Counters()
    for one in parts:
        total.add(one)
    apart, together = statistics_to_proto("m", "1", parts), statistics_to_proto("m", "1", [total])
    assert together.inference_count == apart.inference_count
    assert together.execution_count == apart.execution_count
    assert together.last_inference == apart.last_inference
    assert [one.compute_infer.count for one in together.batch_stats] == [
        one.compute_infer.count for one in apart.batch_stats
    ]
    assert together.inference_stats.success.ns == pytest.approx(apart.inference_stats.success.ns, abs=len(parts))
    assert (
        total.ttft.counts == [sum(counts) for counts in zip(*(one.ttft.counts for one in parts), strict=True)]
        or not parts
    )


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


def test_a_service_without_requests_has_every_figure_too() -> None:
    (found,) = add_statistics(["m"], []).model_stats
    assert {one.name for one, _ in found.inference_stats.ListFields()} == {
        "success",
        "fail",
        "queue",
        "compute_input",
        "compute_infer",
        "compute_output",
    }


def test_every_sample_belongs_to_a_family_of_its_type() -> None:
    state = AgentState(node="a", version="1")
    text = exposition(agent_metrics(state, {"chat": [_counted(1, 0.1, 1)]}, ())).decode()
    families = list(text_string_to_metric_families(text))
    assert "unknown" not in {family.type for family in families}
    counters = {family.name: family for family in families if family.type == "counter"}
    assert {"nv_inference_count", "nv_inference_request_success", "executor_prompt_tokens"} <= counters.keys()
    assert '\nnv_inference_count{model="chat",version="1"} 1.0\n' in text, "Triton's names have no _total"
    assert '\nexecutor_prompt_tokens_total{model="chat",version="1"} 1.0\n' in text
    assert all(family.documentation for family in families)


def test_the_exposition_has_what_the_process_uses() -> None:
    assert b"process_resident_memory_bytes" in exposition(iter(()))
