"""What is said of a request when it is over: one line in the log, one span, and nothing of what it asked or got."""

import asyncio
import json
import logging
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from api_server import CHAT, COMPLETE, CONVERSE, NAME, Scripted, api
from ingot.engines.errors import EngineError
from ingot.runtime.server import app as app_module
from ingot.runtime.server import tracing
from ingot.runtime.server.config import ServerConfig
from ingot.runtime.server.logs import JsonLines, TextLines, fields
from ingot.runtime.server.metrics import Observed, ServerMetrics
from ingot.runtime.server.router import app as router_module
from ingot.runtime.server.telemetry import Record, route_of
from ingot.runtime.server.tracing import Tracing, open_tracing, wanted
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient
from stub_backend import EVENT_STREAM, Stub, answer, asynchronous, chunk, routing, say

SECRET = "the word xyzzy"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def client_of(llm, **config):
    app, _ = api(Observed(llm, ServerMetrics(llm, NAME)), **config)
    return TestClient(app, headers={"content-type": "application/json"}, raise_server_exceptions=False)


def lines(caplog):
    return [each.fields for each in caplog.records if each.name == "ingot.request"]


def text(caplog):
    """All that is logged, in both forms; the test's own client logs, too."""
    records = [each for each in caplog.records if each.name.startswith("ingot")]
    return "".join(form.format(record) for record in records for form in (JsonLines(), TextLines()))


@pytest.fixture
def info(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def test_each_request_is_one_line(llm, info):
    with client_of(llm) as client:
        body = {"prompt": SECRET, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        whole = client.post(COMPLETE, json=body, headers={"X-Request-Id": "abc"})
        usage = whole.json()["usage"]
        client.post(COMPLETE, json=body | {"stream": True, "n": 2, "prompt": [SECRET, SECRET]})
        client.post(COMPLETE, json={"prompt": SECRET, "max_tokens": -1})
        client.get(f"/{SECRET}")
        for path in ("/health", "/ready", "/metrics", "/"):
            client.get(path)
    first, second, third, fourth = lines(info)
    assert first == {
        "event": "request", "request_id": "abc", "method": "POST", "route": COMPLETE, "status": 200, "gone": False,
        "model": NAME, "prompt_tokens": usage["prompt_tokens"], "output_tokens": 5, "finish_reason": "length",
        "cached_tokens": 0, "duration": first["duration"], "ttft": first["ttft"], "queue_time": first["queue_time"],
    }  # fmt: skip
    assert 0 <= first["queue_time"] < first["ttft"] < first["duration"] < 30
    assert (second["prompt_tokens"], second["output_tokens"]) == (2 * usage["prompt_tokens"], 20)
    assert second["finish_reason"] == "length,length,length,length" and second["status"] == 200
    assert third["status"] == 400 and "finish_reason" not in third and "error" not in third
    assert fourth["status"] == 404 and fourth["route"] == "(none)" and len(fourth["request_id"]) == 32
    assert "xyzzy" not in text(info) and whole.json()["choices"][0]["text"] not in text(info)


def test_probes_are_told_only_to_who_wants_all(llm, caplog):
    caplog.set_level(logging.DEBUG)
    with client_of(llm) as client:
        client.get("/health")
        assert client.get("/page/none.js").status_code == 404
    assert [each["route"] for each in lines(caplog)] == ["/health", "/page/{file}"]


def test_keys_are_never_told(llm, info):
    with client_of(llm, api_keys=("sk-right",)) as client:
        for key in ("sk-wrong", "sk-right"):
            client.get("/v1/models/sk-right", headers={"Authorization": f"Bearer {key}"})
    assert [each["status"] for each in lines(info)] == [401, 404]
    assert lines(info)[0]["route"] == "/v1/models/{model}" and "sk-" not in text(info)


def test_a_client_that_leaves_and_an_engine_that_fails(llm, info):
    async def leave(stream):
        """Asks as ASGI does, and is gone after the first piece, or before there is any."""
        app, _ = api(Observed(llm, ServerMetrics(llm, NAME)))
        body = json.dumps({"prompt": "a", "max_tokens": 3000, "ignore_eos": True, "stream": stream}).encode()
        left, messages = asyncio.Event(), [{"type": "http.request", "body": body}]

        async def receive():
            if messages:
                return messages.pop()
            await (left.wait() if stream else asyncio.sleep(0.2))
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.body":
                left.set()

        scope = {"type": "http", "method": "POST", "path": COMPLETE, "query_string": b"", "raw_path": b"",
                 "headers": [(b"content-type", b"application/json")]}  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 30)

    asyncio.run(leave(True))
    asyncio.run(leave(False))
    streamed, whole = lines(info)
    assert streamed["gone"] and streamed["status"] == 200 and streamed["finish_reason"] == "abort"
    assert 0 < streamed["output_tokens"] < 3000 and streamed["ttft"] > 0
    assert whole["gone"] and whole["status"] == 499 and whole["finish_reason"] == "abort"
    with client_of(Scripted(llm, "a", EngineError("It broke."))) as client:
        client.post(COMPLETE, json={"prompt": "a", "stream": True})
        client.post(COMPLETE, json={"prompt": "a"})
    for failed, status in zip(lines(info)[2:], (200, 503), strict=True):
        assert failed["error"] == "EngineError" and failed["finish_reason"] == "error" and not failed["gone"]
        assert failed["status"] == status


def test_lines_are_objects_or_text():
    record = logging.makeLogRecord(
        {"name": "a", "levelname": "INFO", "msg": "said %s", "args": ("so\n",), "created": 0.5, "msecs": 500.0}
        | fields("happened", pid=7, what='a "b"', none=None)
    )
    assert json.loads(JsonLines("replica 1").format(record)) == {
        "time": "1970-01-01T00:00:00.500Z", "level": "info", "logger": "a", "message": "said so\n",
        "process": "replica 1", "event": "happened", "pid": 7, "what": 'a "b"', "none": None,
    }  # fmt: skip
    assert "\n" not in JsonLines().format(record)
    assert TextLines("replica 1").format(record).endswith(' INFO replica 1 a said so\n pid=7 what="a \\"b\\""')
    try:
        raise ValueError("wrong")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert "ValueError: wrong" in json.loads(JsonLines().format(record))["exception"]
    assert "ValueError: wrong" in TextLines().format(record)


def test_routes_are_few():
    paths = ("/v1/models", "/v1/models/a/b", "/page/x.js", "/metrics", "/metrics/", "x")
    assert [route_of(path) for path in paths] == [
        "/v1/models", "/v1/models/{model}", "/page/{file}", "/metrics", "", "",
    ]  # fmt: skip


# -- spans -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spans(monkeypatch):
    """What is exported, a list that grows; server and router make spans."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for module in (app_module, router_module):
        monkeypatch.setattr(module, "open_tracing", lambda endpoint: Tracing(provider))
    return exporter.get_finished_spans


def test_a_span_for_each_request(llm, spans, info):
    with client_of(llm) as client:
        body = {"messages": CHAT, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": True}
        client.post(CONVERSE, json=body, headers={
            "traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "a=b", "X-Request-Id": "abc"})  # fmt: skip
        client.post(COMPLETE, json={"prompt": SECRET, "max_tokens": -1}, headers={"traceparent": "nonsense"})
        client.get("/health")
    first, second = spans()
    assert first.name == f"POST {CONVERSE}" and first.kind.name == "SERVER" and first.status.status_code.name == "UNSET"
    assert (f"{first.context.trace_id:032x}", f"{first.parent.span_id:016x}") == (TRACE, CALLER)
    found = dict(first.attributes)
    for name in ("time_in_queue", "time_to_first_token", "e2e"):
        assert 0 <= found.pop(f"gen_ai.latency.{name}") < 30
    assert found.pop("gen_ai.usage.input_tokens") > 4 and found.pop("url.scheme") == "http"
    assert found == {
        "http.request.method": "POST", "http.route": CONVERSE, "http.response.status_code": 200,
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "ingot", "gen_ai.request.id": "abc",
        "gen_ai.request.model": NAME, "gen_ai.response.model": NAME, "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.output_tokens": 4, "gen_ai.usage.cache_read.input_tokens": 0,
    }  # fmt: skip
    assert second.parent is None and second.attributes["http.response.status_code"] == 400
    assert "gen_ai.request.model" not in second.attributes
    assert lines(info)[0]["trace_id"] == TRACE
    assert SECRET not in "".join(span.to_json() for span in spans())


def test_what_fails_is_an_error(llm, spans):
    with client_of(Scripted(llm, "a", EngineError("It broke."))) as client:
        client.post(COMPLETE, json={"prompt": "a", "stream": True})
    (span,) = spans()
    assert span.status.status_code.name == "ERROR" and span.attributes["error.type"] == "EngineError"
    assert span.attributes["http.response.status_code"] == 200


@asynchronous
async def test_the_router_is_between_caller_and_server(spans):
    async def script(stub, asked, writer):
        if "stream" in asked[1]:
            await say(writer, EVENT_STREAM.encode(), chunk(b"data: [DONE]\n\n"), chunk(b""))
        else:
            await say(writer, answer(200))

    stub = Stub(script)
    async with routing(stub) as (client, _):
        await client.post(COMPLETE, json={}, headers={"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "a=b"})
        await client.get("/v1/models")
        await client.get("/metrics")
    first, second = spans()
    assert f"{first.parent.span_id:016x}" == CALLER and first.attributes["ingot.backend"] == stub.url
    one, other = (asked[2] for asked in stub.asked)
    assert one["traceparent"] == f"00-{TRACE}-{first.context.span_id:016x}-01" and one["tracestate"] == "a=b"
    assert second.parent is None and f"{second.context.span_id:016x}" in other["traceparent"]


@asynchronous
async def test_without_spans_the_router_passes_the_context_on():
    stub, parent = Stub(), f"00-{TRACE}-{CALLER}-01"
    async with routing(stub) as (client, _):
        await client.get("/v1/models", headers={"traceparent": parent})
    assert stub.asked[0][2]["traceparent"] == parent


def test_spans_reach_a_collector(llm):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    got = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made = open_tracing(f"http://127.0.0.1:{server.server_port}/")
        scope = {"headers": []}
        record = Record("GET", "/v1/models")
        made.end(made.begin(scope, record), record)
        assert made.provider.force_flush(5000)
        server.shutdown()
    ((path, body),) = got
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert path == "/v1/traces" and resource.scope_spans[0].spans[0].name == "GET /v1/models"
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "ingot"


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318", "OTEL_SDK_DISABLED": "True"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_opentelemetrys_variables_are_heard(environment, on):
    assert wanted(None, environment) is on
    assert wanted("http://a:4318", environment)


def test_what_cannot_be_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(EngineError, match="otlp_endpoint is 'localhost:4318'; it must be a URL"):
        ServerConfig(engine=tmp_path, otlp_endpoint="localhost:4318")
    with pytest.raises(EngineError, match="over http/protobuf, but the environment asks for 'grpc'"):
        wanted("http://a", {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(EngineError, match=r"^Spans need .*pip install 'ingot\[otel\]'` in ingot's environment\.$"):
        ServerConfig(engine=tmp_path, otlp_endpoint="http://localhost:4318")
    assert tracing.open_tracing(None) is None


def test_off_it_costs_nothing(engine):
    check = """
import sys
from api_server import api
from ingot import AsyncLLM
app, _ = api(AsyncLLM(sys.argv[1]))
assert not [name for name in sys.modules if name.startswith("opentelemetry.sdk")]
assert "Telemetry" not in [each.cls.__name__ for each in app.user_middleware]
"""
    path = [*sys.path, *(str(p) for p in __import__("pathlib").Path(__file__).parents[1:2])]
    done = subprocess.run([sys.executable, "-c", check, str(engine)], capture_output=True, text=True, timeout=300,
                          env={"PYTHONPATH": ":".join(path), "PATH": ""})  # fmt: skip
    assert done.returncode == 0, done.stderr
