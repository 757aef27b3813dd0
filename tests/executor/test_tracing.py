from __future__ import annotations

import asyncio
import contextvars
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from executor import agent, gateway
from executor.control_client import GatewayClient
from executor.proto import open_inference_pb2 as pb
from executor.proto import open_inference_pb2_grpc
from executor.state import Backend, RoutingTable, ServiceRoutes, Target
from executor.tensors import encode_request
from executor.tracing import NoSpans, Spans, current_traceparent, join_trace, start_tracing
from plans.errors import InvalidInput
from tests.executor.running_agent import WAIT_S, desired, eventually, replica, running_agent
from tests.free_port import free_port


def test_spans_nest_and_carry_what_went_wrong() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = Spans(provider)
    with pytest.raises(KeyError), spans.span("apply", generation=3), spans.span("apply.stage", peer="a"):
        raise KeyError
    inner, outer = exporter.get_finished_spans()
    assert (outer.name, dict(outer.attributes or {})) == ("apply", {"generation": 3})
    assert inner.parent is not None
    assert inner.parent.span_id == outer.context.span_id
    assert inner.events[0].name == "exception"
    spans.close()


def test_an_agent_records_each_request_with_its_time_in_queue_and_in_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(agent, "start_tracing", lambda _: Spans(provider))

    async def scenario() -> None:
        async with running_agent(tmp_path) as client:
            await client.apply(desired(1, g0=[replica("s", "fake-slow-20")]))
            await client.infer("s", [[1, 2, 3, 4], [5, 6, 7, 8]], group="node-a/0")

    asyncio.run(scenario())
    queue, batch, request = exporter.get_finished_spans()
    assert [span.name for span in (queue, batch, request)] == ["agent.queue", "agent.batch", "agent.infer"]
    assert dict(request.attributes or {}) == {"service": "s", "group": "node-a/0"}
    assert dict(batch.attributes or {}) == {"variant": "fake-slow-20", "batch_size": 2}
    for part in (queue, batch):
        assert part.parent is not None
        assert part.parent.span_id == request.context.span_id
        assert part.start_time is not None
        assert part.end_time is not None
    assert queue.end_time == batch.start_time
    assert (batch.end_time or 0) - (batch.start_time or 0) >= 20_000_000 * 0.99


def test_without_a_wish_there_are_none_and_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_TRACES_EXPORTER", raising=False)
    assert type(start_tracing("x")) is NoSpans
    code = (
        "import sys, executor.gateway, executor.controller; assert not any('opentelemetry' in m for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_exporter_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for named in ("smoke-signals", "otlp,zipkin"):
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", named)
        with pytest.raises(InvalidInput, match=f"OTEL_TRACES_EXPORTER: found '{named}', expected otlp, console"):
            start_tracing("x")


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"])
def test_a_protocol_that_is_not_spoken_is_refused_where_it_would_be_used(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "http/protobuf")
    for exporters in ("otlp", "console, otlp"):
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", exporters)
        with pytest.raises(InvalidInput, match=f"{name}: found 'http/protobuf', expected grpc; .* gRPC port"):
            start_tracing("x")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert type(start_tracing("x")) is NoSpans


@pytest.mark.parametrize("exporters", ["console", "none, console"])
def test_spans_may_be_written_to_the_console(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], exporters: str
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", exporters)
    spans = start_tracing("the-service")
    with spans.span("apply", generation=3):
        pass
    spans.close()
    out, told = capsys.readouterr()
    found = json.loads(told)
    assert (found["name"], found["attributes"], out) == ("apply", {"generation": 3}, "")
    assert found["resource"]["attributes"]["service.name"] == "the-service"


def test_a_request_is_one_trace_from_client_to_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwarded as a frame, as a call of its own (above 1 MiB), and as a stream."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(agent, "start_tracing", lambda _: Spans(provider))
    monkeypatch.setattr(gateway, "start_tracing", lambda _: Spans(provider))
    from_client = (("traceparent", f"00-{7:032x}-{9:016x}-01"),)

    async def scenario() -> None:
        async with running_agent(tmp_path / "a") as client:
            await client.apply(desired(1, g0=[replica("s")]))
            target = Target(group="node-a/0", node="node-a", weight=1.0, variant="fake-double")
            table = RoutingTable(
                generation=1,
                placement_digest="d",
                backends=(Backend(node="node-a", address=f"127.0.0.1:{client.port}"),),
                services=(ServiceRoutes(service="s", deadline_s=20.0, targets=(target,)),),
            )
            http = f"127.0.0.1:{free_port()}"
            config = gateway.GatewayConfig(listen="127.0.0.1:0", state_dir=tmp_path / "g", grace_s=0.0, http=http)
            async with gateway.running_gateway(config) as address, grpc.aio.insecure_channel(address) as channel:
                await GatewayClient(channel, address).set_routes(table, timeout_s=5)
                stub: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)

                async def is_ready() -> bool:
                    return bool((await stub.ModelReady(pb.ModelReadyRequest(name="s"))).ready)

                await eventually(is_ready)
                request = encode_request("s", {"x": np.ones((1, 4), np.float32)})
                await stub.ModelInfer(request, metadata=from_client, timeout=WAIT_S)
                call = stub.ModelStreamInfer(metadata=from_client, timeout=WAIT_S)
                await call.write(request)
                await call.done_writing()
                assert [answer.error_message async for answer in call] == [""]
                request.parameters["padding"].string_param = "x" * (2 << 20)
                await stub.ModelInfer(request, metadata=from_client, timeout=WAIT_S)
                tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
                asked = {"json": {"inputs": [tensor]}, "headers": dict(from_client)}
                url = f"http://{http}/v2/models/s/infer"
                async with aiohttp.ClientSession() as session, session.post(url, **asked) as answer:
                    assert answer.status == 200

    asyncio.run(scenario())
    spans = exporter.get_finished_spans()
    assert {span.context.trace_id for span in spans} == {7}
    by_id = {span.context.span_id: span for span in spans}
    paths = []
    for span in spans:
        path, at = [span.name], span
        while at.parent is not None and at.parent.span_id in by_id:
            at = by_id[at.parent.span_id]
            path.append(at.name)
        assert at.parent is not None
        assert at.parent.span_id == 9
        if span.name == "agent.batch":
            paths.append(path)
    whole = ["agent.batch", "agent.infer", "gateway.forward"]
    assert paths == [whole, ["agent.batch", "agent.infer", "gateway.stream"], whole, whole]


@pytest.mark.parametrize("traceparent", ["", "nonsense", "00-0-0-01"])
def test_a_span_without_a_caller_to_join_begins_a_trace(traceparent: str) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def inside() -> None:
        join_trace(traceparent)
        with Spans(provider).span("alone"):
            assert current_traceparent().startswith("00-")
        assert current_traceparent() == traceparent

    contextvars.copy_context().run(inside)
    (span,) = exporter.get_finished_spans()
    assert span.parent is None
