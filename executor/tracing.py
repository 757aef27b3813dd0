"""OpenTelemetry spans, where the user asks for them: off by default, and nothing is imported then.

The standard variables choose the exporter, as the OpenTelemetry conventions say: ``OTEL_TRACES_EXPORTER=otlp`` turns it
on, ``OTEL_EXPORTER_OTLP_ENDPOINT`` says where to, ``OTEL_SERVICE_NAME`` under which name. Needs the extra ``tracing``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from plans.errors import InvalidInput

__all__ = ["NoSpans", "Spans", "start_tracing"]


class NoSpans:
    """What is used when nobody asked for spans: does nothing."""

    @contextlib.contextmanager
    def span(self, name: str, **attributes: str | int | float) -> Iterator[None]:
        """Mark the block; not here."""
        yield

    def close(self) -> None:
        """Send what is left; nothing here."""


class Spans(NoSpans):
    """Records spans with an OpenTelemetry provider.

    Args:
        provider: ``opentelemetry.sdk.trace.TracerProvider``.
    """

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("foreplan")

    @contextlib.contextmanager
    def span(self, name: str, **attributes: str | int | float) -> Iterator[None]:
        """Record the block as the span ``name``; an exception that leaves it is recorded with it."""
        with self._tracer.start_as_current_span(name, attributes=attributes):
            yield

    def record(self, name: str, start_s: float, end_s: float, **attributes: str | int | float) -> None:
        """Record a span that is over, inside the current one; its times in seconds since 1970."""
        span = self._tracer.start_span(name, start_time=int(start_s * 1e9), attributes=attributes)
        span.end(int(end_s * 1e9))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def start_tracing(service: str) -> NoSpans:
    """Return what records spans of this process, called ``service`` unless ``OTEL_SERVICE_NAME`` says otherwise.

    Raises:
        InvalidInput: Spans are asked for, and the extra is not installed or the exporter is not known.
    """
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "none")
    if exporter == "none":
        return NoSpans()
    if exporter != "otlp":
        raise InvalidInput.of("otlp or none", where="OTEL_TRACES_EXPORTER", found=repr(exporter))
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        remedy = "pip install 'foreplan[tracing]'"
        found = f"no module {error.name!r}"
        raise InvalidInput.of("OpenTelemetry", where="OTEL_TRACES_EXPORTER", found=found, remedy=remedy) from error
    name = os.environ.get("OTEL_SERVICE_NAME", service)
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Spans(provider)
