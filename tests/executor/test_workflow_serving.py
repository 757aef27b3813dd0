"""Workflows over real agents (workers of the fake runtime, which double) and a real gateway on loopback."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from executor import agent, gateway
from executor.load import replay
from executor.proto import open_inference_pb2 as pb
from executor.tensors import decode_outputs, encode_request
from executor.tracing import Spans
from plans.plan import Plan, Route
from plans.service import Services
from tests.executor.peer_process import PeerProcess, processes
from tests.executor.running_agent import eventually, worker_processes
from tests.executor.workflow_site import CHAIN_EDGES, DOUBLE, ROW, Site, handing_on, on_site, plan, workflow
from traces.table import RequestTrace

CHAIN = workflow(*CHAIN_EDGES)
ACROSS = plan(CHAIN, {"a/0": {"first": DOUBLE, "last": DOUBLE}, "b/0": {"then": DOUBLE}})


def test_a_chain_over_two_agents_answers_with_the_outputs_of_its_end(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        await site.apply(ACROSS)
        assert await site.outputs(first__x=ROW) == {"last.y": (8 * ROW).tolist()}
        assert await site.outputs(x=np.vstack([ROW, 2 * ROW])) == {"last.y": np.vstack([8 * ROW, 16 * ROW]).tolist()}
        assert await site.outputs(x=ROW, outputs=("last.y",), parameters={"priority": 1}) == {
            "last.y": (8 * ROW).tolist()
        }
        told = await site.inference.ModelMetadata(pb.ModelMetadataRequest(name="flow"))
        assert [(one.name, list(one.shape)) for one in told.inputs] == [("first.x", [-1, 4])]
        assert [one.name for one in told.outputs] == ["last.y"]
        config = (await site.inference.ModelConfig(pb.ModelConfigRequest(name="flow"))).config
        assert [(one.name, list(one.dims)) for one in config.input] == [("first.x", [4])]
        counted = await site.inference.ModelStatistics(pb.ModelStatisticsRequest(name="flow"))
        assert counted.model_stats[0].inference_stats.success.count == 3
        for stage in ("first", "then", "last"):
            counted = await site.inference.ModelStatistics(pb.ModelStatisticsRequest(name=stage))
            assert counted.model_stats[0].inference_stats.success.count == 3
        assert (await site.inference.ModelReady(pb.ModelReadyRequest(name="flow"))).ready
        stream = site.inference.ModelStreamInfer(iter([encode_request("flow", {"x": ROW}, request_id="1")]))
        (answer,) = [part.infer_response async for part in stream]
        assert (answer.id, decode_outputs(answer)["last.y"].tolist()) == ("1", (8 * ROW).tolist())

    on_site(tmp_path, scenario)


def test_what_a_request_lacks_or_has_too_much_of_is_said(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        await site.apply(ACROSS)
        code, details = await site.failure(first__z=ROW)
        assert code == "INVALID_ARGUMENT"
        assert "workflow 'flow': stage 'first'" in details
        assert "no such tensor" in details
        for asked in ({"x": ROW, "outputs": ("nobody.y",)}, {"x": ROW, "parameters": {"workflow_position": -1}}):
            assert (await site.failure(**asked))[0] == "INVALID_ARGUMENT"
        code, details = await site.failure(x=ROW, parameters={"workflow_stage": "then", "workflow_digest": "0"})
        assert (code, "not known here" in details) == ("UNAVAILABLE", True)
        assert (await site.failure(x=ROW, name="other"))[0] == "NOT_FOUND"
        assert await site.outputs(x=ROW) == {"last.y": (8 * ROW).tolist()}

    on_site(tmp_path, scenario)


def test_forks_join_fan_out_and_scatter(tmp_path: Path) -> None:
    groups = {"a/0": {"a": DOUBLE, "d": DOUBLE}, "b/0": {"b": DOUBLE, "c": DOUBLE}}
    diamond = workflow(
        handing_on("a", "b"), handing_on("a", "c"), handing_on("b", "d"), {"from": "c", "to": "d"}, handing_on("c", "e")
    )
    fan = workflow(handing_on("a", "b", fanout=3), {"from": "b", "to": "c", "fanout": 0.34}, handing_on("b", "d"))
    scattered = workflow(handing_on("a", "b", scatter=True), handing_on("b", "c"))

    async def scenario(site: Site) -> None:
        await site.apply(plan(diamond, {**groups, "b/1": {"e": DOUBLE}}))
        assert await site.outputs(x=ROW) == {"d.y": (8 * ROW).tolist(), "e.y": (8 * ROW).tolist()}
        assert await site.outputs(x=ROW, outputs=("e.y",)) == {"e.y": (8 * ROW).tolist()}

        await site.apply(plan(fan, groups))
        sent = np.vstack(
            [ROW, 2 * ROW]
        )  # what nothing hands over, the client sends along: two rows for one or two calls
        assert await site.outputs(a__x=ROW, c__x=sent) == {
            "c.y": (2 * sent).tolist(),
            "d.y": np.vstack([8 * ROW] * 3).tolist(),
        }

        await site.apply(plan(scattered, groups))
        rows = np.vstack([number * ROW for number in range(1, 5)])
        before = (await site.inference.ModelStatistics(pb.ModelStatisticsRequest(name="b"))).model_stats[0]
        assert await site.outputs(x=rows) == {"c.y": (8 * rows).tolist()}
        after = (await site.inference.ModelStatistics(pb.ModelStatisticsRequest(name="b"))).model_stats[0]
        assert after.inference_stats.success.count - before.inference_stats.success.count == 4

    on_site(tmp_path, scenario)


def with_a_slow_plan(made: Plan, group: str, service: str, batch_s: float) -> Plan:
    """Return ``made`` where one replica takes long by plan, and gets all requests of its service."""
    groups = tuple(
        one.model_copy(
            update={
                "loadout": tuple(
                    entry.model_copy(update={"stage_latency_s": ((batch_s,),) * entry.max_batch})
                    if (one.id, entry.service) == (group, service)
                    else entry
                    for entry in one.loadout
                )
            }
        )
        for one in made.groups
    )
    routes = {**made.routes, service: (Route(group=group, weight=1.0),)}
    return made.model_copy(update={"groups": groups, "routes": routes})


def test_a_stage_that_drops_fails_the_request_with_its_status_and_name(tmp_path: Path) -> None:
    across = plan(CHAIN, {"a/0": {"first": DOUBLE, "last": DOUBLE}, "b/0": {"then": DOUBLE}, "b/1": {"then": DOUBLE}})

    async def scenario(site: Site) -> None:
        await site.apply(with_a_slow_plan(across, "b/1", "then", 30.0))
        code, details = await site.failure(x=ROW, timeout_s=10.0)
        assert code == "DEADLINE_EXCEEDED"
        assert details.startswith("workflow 'flow': stage 'then': then (fake-double) on b/1: the deadline cannot")
        assert await site.outputs(x=ROW) == {"last.y": (8 * ROW).tolist()}
        counted = await site.inference.ModelStatistics(pb.ModelStatisticsRequest(name="flow"))
        assert counted.model_stats[0].inference_stats.fail.count == 1
        counted = await site.inference.ModelStatistics(pb.ModelStatisticsRequest(name="last"))
        assert counted.model_stats[0].inference_stats.success.count == 1

    on_site(tmp_path, scenario)


def test_requests_whose_client_gave_up_wait_nowhere(tmp_path: Path) -> None:
    slow = plan(workflow(handing_on("first", "then")), {"a/0": {"first": DOUBLE}, "b/0": {"then": "fake-slow-20"}})

    async def scenario(site: Site) -> None:
        async def given_up() -> int:
            counted = await site.inference.ModelStatistics(pb.ModelStatisticsRequest(name="then"))
            return int(counted.model_stats[0].inference_stats.fail.count)

        await site.apply(slow)
        asked = [asyncio.create_task(site.ask(x=ROW)) for _ in range(60)]  # four in a batch: for 0.3 s
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        for task in asked:
            task.cancel()
        await eventually(given_up)
        assert await site.outputs(x=ROW) == {"then.y": (4 * ROW).tolist()}

    on_site(tmp_path, scenario)


def test_the_next_stage_is_tried_on_another_replica_when_one_is_lost(tmp_path: Path) -> None:
    both = plan(
        CHAIN,
        {"a/0": {"first": DOUBLE, "last": DOUBLE}, "b/0": {"then": "fake-slow-20"}, "c/0": {"then": "fake-slow-20"}},
    )

    async def scenario(site: Site) -> None:
        await site.apply(both)
        asked = [asyncio.create_task(site.ask(x=ROW)) for _ in range(40)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        for process in worker_processes():
            if any("b-0" in part or "b/0" in part for part in process.cmdline()):
                process.kill()
        await site.agents["b"].end()
        answers = await asyncio.gather(*asked)
        assert len(answers) == 40
        assert await site.outputs(x=ROW) == {"last.y": (8 * ROW).tolist()}
        await site.agents["c"].end()
        code, details = await site.failure(x=ROW)
        assert code == "UNAVAILABLE"
        assert "workflow 'flow': stage 'then'" in details

    on_site(tmp_path, scenario, nodes="abc")


def test_a_call_whose_agent_hangs_goes_to_another_replica_and_does_not_wait_for_its_deadline(tmp_path: Path) -> None:
    hanging, healthy = (PeerProcess("agent", tmp_path / f"agent-{node}", node=node) for node in "bc")
    two = {"b/0": {"then": DOUBLE}, "c/0": {"then": DOUBLE}}

    async def scenario(site: Site) -> None:
        with processes(hanging, healthy):
            site.join(b=hanging.address, c=healthy.address)
            await site.apply(plan(CHAIN, {"a/0": {"first": DOUBLE, "last": DOUBLE}} | two))
            await asyncio.gather(*(site.ask(x=ROW) for _ in range(4)))
            hanging.process.send_signal(signal.SIGSTOP)
            answers = await asyncio.gather(*(site.ask(x=ROW, timeout_s=30.0) for _ in range(8)))
            assert all(decode_outputs(answer)["last.y"].tolist() == (8 * ROW).tolist() for answer in answers)

    on_site(tmp_path, scenario, nodes="a")


def test_no_request_is_lost_while_stages_move(tmp_path: Path) -> None:
    def made(then: str, last: str) -> Plan:
        groups: dict[str, dict[str, str]] = {"a/0": {"first": DOUBLE}}
        for group, service in ((then, "then"), (last, "last")):
            groups.setdefault(group, {})[service] = "fake-slow-20"
        return plan(CHAIN, groups)

    async def scenario(site: Site) -> None:
        await site.apply(made("b/0", "a/1"))
        moved = asyncio.Event()
        asked: list[asyncio.Task[Any]] = []

        async def asking() -> None:
            while not moved.is_set():
                asked.append(asyncio.create_task(site.ask(x=ROW)))
                await asyncio.sleep(0.01)  # the rate of the requests

        load = asyncio.create_task(asking())
        for then, last in (("a/2", "b/1"), ("b/0", "b/0"), ("a/3", "a/0")):
            await site.apply(made(then, last))
        moved.set()
        await load
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert len(answers) > 20
        assert [answer for answer in answers if isinstance(answer, BaseException)] == []

    on_site(tmp_path, scenario)


def test_an_agent_goes_on_with_its_workflows_after_a_plan_without_them_is_taken_back(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        await site.apply(ACROSS)
        await site.apply(ACROSS.model_copy(update={"workflows": ()}))
        assert (await site.failure(x=ROW))[0] == "NOT_FOUND"
        await site.apply(ACROSS)
        assert await site.outputs(x=ROW) == {"last.y": (8 * ROW).tolist()}

    on_site(tmp_path, scenario)


def test_with_certificates_agents_hand_stages_to_each_other(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        await site.apply(ACROSS)
        assert await site.outputs(x=ROW) == {"last.y": (8 * ROW).tolist()}

    on_site(tmp_path, scenario, certificates=True)


def test_tensors_too_large_for_the_shared_connection_go_by_calls(tmp_path: Path) -> None:
    across = plan(CHAIN, {"a/0": {"first": DOUBLE, "last": DOUBLE}, "b/0": {"then": DOUBLE}}, max_batch=4096)
    flow = across.workflows[0].model_copy(update={"edges": across.workflows[0].edges[:1]})
    rows = np.ones((80_000, 4), np.float32)

    async def scenario(site: Site) -> None:
        await site.apply(across.model_copy(update={"workflows": (flow,)}))
        code, details = await site.failure(x=rows)
        assert code == "INVALID_ARGUMENT"
        assert "stage 'first'" in details
        assert "a batch of 1 to 4096" in details

    on_site(tmp_path, scenario)


def test_one_request_is_one_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for module in (agent, gateway):
        monkeypatch.setattr(module, "start_tracing", lambda _: Spans(provider))

    async def scenario(site: Site) -> None:
        await site.apply(ACROSS)
        exporter.clear()
        await site.ask(x=ROW)

    on_site(tmp_path, scenario)
    spans = exporter.get_finished_spans()
    stages = [dict(span.attributes or {})["service"] for span in spans if span.name == "workflow.stage"]
    assert sorted(map(str, stages)) == ["first", "last", "then"]
    assert len({span.context.trace_id for span in spans if span.context}) == 1


def test_a_trace_of_a_workflow_is_replayed_and_counted_as_one_service(tmp_path: Path) -> None:
    services = Services.model_validate(
        {
            "services": [
                {"name": name, "slo": {"deadline": "60s"}, "variants": [{"model": DOUBLE}]}
                for name in ("first", "then", "last")
            ],
            "workflows": [CHAIN.model_dump(by_alias=True)],
        }
    )
    names = ["flow", "first"] * 15
    trace = RequestTrace(pd.DataFrame({"arrival_s": np.arange(30) * 0.005, "service": names}))

    async def scenario(site: Site) -> None:
        await site.apply(ACROSS)
        result = await replay(trace, site.gateway, services)
        assert [(one.service, one.offered, one.good) for one in result.summary.services] == [
            ("first", 15, 15),
            ("flow", 15, 15),
        ]
        answer = await site.inference.ModelInfer(
            encode_request("flow", {"x": ROW}, parameters={"workflow_position": 7}), timeout=30
        )
        assert answer.parameters["workflow_position"].int64_param == 7

    on_site(tmp_path, scenario)
