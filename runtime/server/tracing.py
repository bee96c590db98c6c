"""OpenTelemetry spans, an optional extra: one for each request, sent to a collector as OTLP over HTTP.

On with `--otlp-endpoint` or OpenTelemetry's own variables, of which the SDK reads the rest (headers, sampler, service
name). Attributes are those of its conventions for HTTP and generative AI, latencies by the names that vLLM gives them.
Invariant: nothing of OpenTelemetry is imported unless it is on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ...engines.errors import EngineError
from ...engines.extras import pip_install

if TYPE_CHECKING:
    from .telemetry import Record

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_HTTP = "http/protobuf"
_PATH = "/v1/traces"
_CONTEXT = (b"traceparent", b"tracestate")
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
EXPORT_TIMEOUT = 5.0  # seconds; the end of the process may wait that long for a collector that is gone


def wanted(endpoint: str | None, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether spans are asked for, by the option or by the variables. Raises EngineError: they cannot be had."""
    disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    others = environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp"
    if endpoint is None and (disabled or others or not any(environment.get(name) for name in _ENDPOINTS)):
        return False
    if endpoint is not None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EngineError(f"otlp_endpoint is {endpoint!r}; it must be a URL as http://localhost:4318.")
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), _HTTP)
    if protocol != _HTTP:
        raise EngineError(f"Spans are sent as OTLP over {_HTTP}, but the environment asks for {protocol!r}.")
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"Spans need OpenTelemetry's SDK and exporter ({error}); install them with {pip_install('otel')}."
        ) from None
    return True


def open_tracing(endpoint: str | None) -> Tracing | None:
    """Spans for a collector, None where they are not asked for. endpoint: its base URL. Raises EngineError."""
    if not wanted(endpoint):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if endpoint is not None and not urlsplit(endpoint).path.endswith(_PATH):
        endpoint = endpoint.rstrip("/") + _PATH
    told = OTELResourceDetector().detect().attributes  # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
    resource = Resource.create({"service.name": "ingot", "service.version": version("ingot"), **told})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=EXPORT_TIMEOUT)))
    return Tracing(provider)


class Tracing:
    """Makes spans. provider: of OpenTelemetry's SDK."""

    def __init__(self, provider: Any):
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api, self.provider = trace, provider
        self._tracer = provider.get_tracer("ingot", version("ingot"))
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, scope: Any, record: Record) -> Any:
        """A span, the caller's child if the request says so. The headers name it from now on, so that it is the parent
        of whatever the request is passed on to."""
        context = [(name, value) for name, value in scope["headers"] if name in _CONTEXT]
        carrier = {name.decode(): value.decode("latin-1") for name, value in context}
        span = self._tracer.start_span(
            f"{record.method} {record.route}".rstrip(),
            self._propagator.extract(carrier),
            self._api.SpanKind.SERVER,
            {
                "http.request.method": record.method, "url.scheme": scope.get("scheme", "http"),
                **({"http.route": record.route} if record.route else {}),
            },
        )  # fmt: skip
        onward: dict[str, str] = {}
        self._propagator.inject(onward, self._api.set_span_in_context(span))
        others = [(name, value) for name, value in scope["headers"] if name not in _CONTEXT]
        scope["headers"] = others + [(name.encode(), value.encode("latin-1")) for name, value in onward.items()]
        record.trace_id = f"{span.get_span_context().trace_id:032x}"
        return span

    def end(self, span: Any, record: Record) -> None:
        """The request is over."""
        status = record.status or 0
        span.set_attributes({name: value for name, value in _attributes(record).items() if value is not None})
        if status >= 500 or record.error is not None:
            span.set_attribute("error.type", record.error or str(status))
            span.set_status(self._api.StatusCode.ERROR)
        span.end()


def _attributes(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = {
        "http.response.status_code": record.status, "gen_ai.request.id": record.request_id or None,
        "ingot.backend": record.backend, "ingot.client_gone": record.gone or None,
    }  # fmt: skip
    if record.finish_reasons:
        found |= {
            "gen_ai.operation.name": _OPERATIONS.get(record.route), "gen_ai.provider.name": "ingot",
            "gen_ai.request.model": record.model, "gen_ai.response.model": record.model,
            "gen_ai.response.finish_reasons": record.finish_reasons,
            "gen_ai.usage.input_tokens": record.num_prompt, "gen_ai.usage.output_tokens": record.num_output,
            "gen_ai.usage.cache_read.input_tokens": record.num_cached,
            "gen_ai.latency.time_in_queue": record.queued, "gen_ai.latency.time_to_first_token": record.ttft,
            "gen_ai.latency.e2e": record.duration,
        }  # fmt: skip
    return found
