"""OpenTelemetry spans, where the user asks for them: off by default, and nothing is imported then.

The standard variables choose the exporter, as the OpenTelemetry conventions say: ``OTEL_TRACES_EXPORTER`` turns it on
(``otlp``, ``console`` for stderr, or both with a comma), ``OTEL_EXPORTER_OTLP_ENDPOINT`` says where to, over gRPC only,
and ``OTEL_SERVICE_NAME`` under which name. Needs the extra ``tracing``.

One request is one trace: who calls says which span it calls from (W3C Trace Context, ``traceparent``), a client or a
gateway in the metadata of its call or the headers of its HTTP request, a gateway in the frames that it forwards too.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from plans.errors import Fault, InvalidInput

__all__ = ["NoSpans", "Spans", "current_traceparent", "join_trace", "start_tracing", "traceparent_in"]

_HEADER = "traceparent"
_EXPORTERS = "OTEL_TRACES_EXPORTER"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_traceparent: ContextVar[str] = ContextVar(_HEADER, default="")


def join_trace(traceparent: str) -> None:
    """Let spans of this task be inside the span that ``traceparent`` names; a malformed or empty one names none."""
    if traceparent:
        _traceparent.set(traceparent)


def current_traceparent() -> str:
    """Return the name of the span that this task is in, here or at its caller; empty for none."""
    return _traceparent.get()


def traceparent_in(context: Any) -> str:
    """Return what the caller of a gRPC method says of its span; empty when it says nothing."""
    for key, value in context.invocation_metadata() or ():
        if key == _HEADER:
            return str(value)
    return ""


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
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("foreplan")
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def span(self, name: str, **attributes: str | int | float) -> Iterator[None]:
        """Record the block as the span ``name``; an exception that leaves it is recorded with it."""
        parent = None if self._trace.get_current_span().get_span_context().is_valid else self._remote()
        with self._tracer.start_as_current_span(name, context=parent, attributes=attributes) as span:
            where = span.get_span_context()
            here = f"00-{where.trace_id:032x}-{where.span_id:016x}-{int(where.trace_flags):02x}"
            token = _traceparent.set(here)
            try:
                yield
            finally:
                _traceparent.reset(token)

    def _remote(self) -> Any:
        """Return the span that this task was called from, as a context."""
        return self._propagator.extract({_HEADER: _traceparent.get()}) if _traceparent.get() else None

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
    wanted = _wanted_exporters()
    if not wanted:
        return NoSpans()
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporters = [_exporter(each) for each in sorted(wanted)]
    except ImportError as error:
        remedy = "pip install 'foreplan[tracing]'"
        found = f"no module {error.name!r}"
        raise InvalidInput.of("OpenTelemetry", where=_EXPORTERS, found=found, remedy=remedy) from error
    name = os.environ.get("OTEL_SERVICE_NAME", service)
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return Spans(provider)


def _exporter(name: str) -> Any:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter(out=sys.stderr)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _wanted_exporters() -> frozenset[str]:
    """Return the exporters that the environment asks for.

    Raises:
        InvalidInput: One of them is not known, or speaks a protocol that is not here.
    """
    named = os.environ.get(_EXPORTERS, "")
    wanted = frozenset(one.strip() for one in named.split(",")) - {"", "none"}
    faults = []
    if wanted - {"otlp", "console"}:
        faults.append(Fault(where=_EXPORTERS, found=repr(named), expected="otlp, console, both with a comma, or none"))
    for name in _PROTOCOLS:
        protocol = os.environ.get(name)
        if "otlp" in wanted and protocol:
            if protocol != "grpc":
                remedy = (
                    "leave it out, and give a collector's gRPC port in OTEL_EXPORTER_OTLP_ENDPOINT (4317 by default)"
                )
                faults.append(Fault(where=name, found=repr(protocol), expected="grpc", remedy=remedy))
            break  # the more special one holds
    if faults:
        raise InvalidInput(faults)
    return wanted
