from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from executor import agent
from executor.tracing import NoSpans, Spans, start_tracing
from plans.errors import InvalidInput
from tests.executor.running_agent import desired, replica, running_agent


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
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "smoke-signals")
    with pytest.raises(InvalidInput, match="OTEL_TRACES_EXPORTER"):
        start_tracing("x")
