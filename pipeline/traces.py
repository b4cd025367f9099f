"""Spans of rounds and requests, by OpenTelemetry, where `observe.traces` says where they go. Otherwise nothing is kept.

round → phase → shard        request → generation
"""

import atexit
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from opentelemetry.propagate import extract, inject
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.trace import NoOpTracer, Tracer

from pipeline.errors import ConfigError

SEND_MILLISECONDS = 1000  # workers are ended without a word; so much of the end of a trace may be lost

_tracers: list[Tracer] = []  # of this process: none, or the one


def trace_to(where: str | None) -> None:
    """Where this process sends its spans: an address that takes OTLP over HTTP, or a file, one JSON object a line.
    The first call counts. Raises ConfigError where the exporter is not installed or the file cannot be written."""
    if where is None or _tracers:
        return
    provider = TracerProvider(resource=Resource.create({"service.name": "wiseline"}))
    provider.add_span_processor(_to_address(where) if "://" in where else _to_file(where))
    atexit.register(provider.shutdown)
    _tracers.append(provider.get_tracer("wiseline"))


@contextmanager
def span(name: str, *, within: Mapping[str, str] | None = None, **attributes: str | int | float) -> Iterator[None]:
    """`within`: what `here` said in the process that hands this work out."""
    tracer = _tracers[0] if _tracers else NoOpTracer()
    context = extract(within) if within else None
    with tracer.start_as_current_span(name, context=context, attributes=attributes):
        yield


def past(name: str, *, seconds: float, **attributes: str | int | float) -> None:
    """A span that ends now, after so many seconds; its parts may have run in several tasks."""
    if _tracers:
        now = time.time_ns()
        _tracers[0].start_span(name, attributes=attributes, start_time=now - int(seconds * 1e9)).end(now)


def here() -> dict[str, str]:
    """The span that is open, for another process; empty without one."""
    carrier: dict[str, str] = {}
    inject(carrier)
    return carrier


def _to_address(where: str) -> SpanProcessor:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError(
            "observe.traces names an address, and what sends spans there is not installed; run "
            '`pip install "wiseline[tracing]"` or name a file.'
        ) from None
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=where), schedule_delay_millis=SEND_MILLISECONDS)


def _to_file(where: str) -> SpanProcessor:
    try:
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        file = open(where, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (spans come until the process ends)
    except OSError as error:
        raise ConfigError(f"observe.traces: {where} cannot be written ({error.strerror}).") from None
    exporter = ConsoleSpanExporter(out=file, formatter=lambda one: one.to_json(indent=None) + "\n")
    return SimpleSpanProcessor(exporter)
