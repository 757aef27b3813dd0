from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from executor.tracing import NoSpans, Spans, start_tracing
from plans.errors import InvalidInput


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
