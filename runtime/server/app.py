"""The HTTP application: which path does what, in which order a request is checked, and how the API describes itself.

An endpoint reads the body within its limits, parses it, makes a job and answers; everything it raises becomes an error
body in one place. Bodies are parsed here and not by FastAPI, from bytes in one pass and away from the event loop if
they are long; so their schemas are added to /openapi.json here, too.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.middleware.cors import CORSMiddleware

from ...engines.errors import EngineError, RequestError
from ..request import RANGES
from . import chat, completions
from .answers import Answer, ChatChoice, ChunkChoice, Detokenized, ModelCard, ModelList, TextChoice, Tokens
from .body import Body, parse
from .config import ServerConfig
from .errors import HANDLED, ErrorBody, Refused, respond
from .generation import Generator, off_loop
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .security import Access, Envelope, read_body
from .sse import EventStream, unless_gone
from .telemetry import add_telemetry
from .tracing import open_tracing

VERSION = version_of("ingot")
PAGE = Path(__file__).with_name("page")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_BODIES: tuple[type[BaseModel], ...] = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
_REFERENCE = "#/components/schemas/"


def create_app(llm: Any, config: ServerConfig, admission: Any, metrics: Any) -> FastAPI:
    """The application. llm: has AsyncLLM's interface; admission and metrics as in the modules of these names."""
    generator = Generator(llm, config, admission)
    app = FastAPI(title="ingot", version=VERSION, docs_url=None, redoc_url=None)  # they load from elsewhere
    for kind in HANDLED:
        app.add_exception_handler(kind, respond)
    _probes(app, llm, admission, metrics)
    _models(app, generator)
    _generation(app, generator, config.max_body_bytes)
    _tokens(app, generator, config.max_body_bytes)
    if (PAGE / "index.html").is_file():
        _page(app)
    app.add_middleware(Access, api_keys=config.api_keys)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "Content-Type", "X-Request-Id"),
            expose_headers=("X-Request-Id", "Retry-After"),
        )  # fmt: skip
    app.add_middleware(Envelope)
    add_telemetry(app, open_tracing(config.otlp_endpoint))  # added last: the outermost
    app.openapi = _described(app, app.openapi)  # type: ignore[method-assign]
    return app


def _probes(app: FastAPI, llm: Any, admission: Any, metrics: Any) -> None:
    @app.get("/health", responses=_errors(503))
    async def health() -> Response:
        """Whether the engine lives: 503 with the reason once it has failed."""
        llm.check()
        return _json({"status": "ok"})

    @app.get("/ready", responses=_errors(503))
    async def ready() -> Response:
        """Whether requests should be sent here: not while the server drains or the engine is unhealthy."""
        if not admission.accepting:
            raise Refused(503, "The server is shutting down.")
        llm.check()
        if not llm.healthy:
            raise EngineError("The engine is not healthy.")
        return _json({"status": "ready"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Prometheus' text format."""
        return Response(await metrics.page(), media_type=metrics.content_type)

    @app.get("/version")
    async def version() -> Response:
        """The version of ingot."""
        return _json({"version": VERSION})


def _models(app: FastAPI, generator: Generator) -> None:
    def card() -> ModelCard:
        return ModelCard(generator.model, started, generator.llm.max_model_len)

    started = int(time.time())

    @app.get("/v1/models", responses=_answers(ModelList, 401))
    async def models() -> Response:
        """The model that is served."""
        return _json(ModelList([card()]))

    @app.get("/v1/models/{model:path}", responses=_answers(ModelCard, 401, 404))
    async def model(model: str) -> Response:
        """The same by its name, which may hold slashes."""
        generator.check_model(model)
        return _json(card())


def _generation(app: FastAPI, generator: Generator, max_bytes: int) -> None:
    async def complete(request: Request, kind: type[Body], endpoint: Any) -> Response:
        arrival = asyncio.get_running_loop().time()
        body: Any = await _parsed(request, kind, max_bytes)
        job = await endpoint.prepare(generator, body, request.state.request_id, arrival)
        created = int(time.time())
        if body.stream:
            return EventStream(endpoint.events(generator, body, job, created))
        return _json(await unless_gone(request.receive, endpoint.answer(generator, body, job, created)))

    @app.post("/v1/completions", **_body(CompletionRequest), responses=_answers(Answer[TextChoice], *_FAILURES))
    async def completion(request: Request) -> Response:
        """Continue one prompt or several; with `stream`, events with chunks of the answer and then `[DONE]`."""
        return await complete(request, CompletionRequest, completions)

    @app.post("/v1/chat/completions", **_body(ChatRequest), responses=_answers(Answer[ChatChoice], *_FAILURES))
    async def chat_completion(request: Request) -> Response:
        """Answer a conversation; with `stream`, events with chunks of the answer and then `[DONE]`."""
        return await complete(request, ChatRequest, chat)


def _tokens(app: FastAPI, generator: Generator, max_bytes: int) -> None:
    llm = generator.llm

    @app.post("/tokenize", **_body(TokenizeRequest), responses=_answers(Tokens, *_FAILURES))
    async def tokenize(request: Request) -> Response:
        """The tokens of a text, or of a conversation as the chat template writes it."""
        body = await _parsed(request, TokenizeRequest, max_bytes)
        generator.check_model(body.model)
        if llm.text is None:
            raise RequestError("This engine has no tokenizer.")
        if body.messages is not None:
            special = body.add_special_tokens is True  # templates write their own
            ids = (await chat.encode(llm.text, body.messages, body.tools or (), body, {}, special)).ids
        else:
            prompt, special = body.prompt or "", body.add_special_tokens is not False
            ids = await off_loop(len(prompt), lambda: llm.text.encode(prompt, add_special_tokens=special))
        found = Tokens(len(ids), llm.max_model_len, list(ids))
        if body.return_token_strs:
            found.token_strs = await off_loop(len(ids), lambda: [llm.text.token_text(token) for token in ids])
        return _json(found)

    @app.post("/detokenize", **_body(DetokenizeRequest), responses=_answers(Detokenized, *_FAILURES))
    async def detokenize(request: Request) -> Response:
        """The text of tokens, special ones included."""
        body = await _parsed(request, DetokenizeRequest, max_bytes)
        generator.check_model(body.model)
        if llm.text is None:
            raise RequestError("This engine has no tokenizer.")
        ids = body.tokens
        if ids and not 0 <= min(ids) <= max(ids) < llm.vocab_size:
            raise RequestError(f"tokens holds unknown tokens; the model's are 0 to {llm.vocab_size - 1}.")
        text = await off_loop(len(ids), lambda: llm.text.decode(ids, skip_special_tokens=False))
        return _json(Detokenized(text))


def _page(app: FastAPI) -> None:
    class Page(StaticFiles):
        def file_response(self, *args: Any, **options: Any) -> Response:
            response = super().file_response(*args, **options)
            response.headers.update(PAGE_HEADERS)
            return response

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    app.mount("/page", Page(directory=PAGE))


async def _parsed(request: Request, kind: type[Body], max_bytes: int) -> Body:
    raw = await read_body(request, max_bytes)
    return await off_loop(len(raw), lambda: parse(kind, raw))


def _json(data: Any) -> Response:
    return Response(msgspec.json.encode(data), media_type="application/json")


# -- /openapi.json -----------------------------------------------------------------------------------------------------

_FAILURES = (400, 401, 404, 413, 415, 429, 503, 504)
_ANSWERS = (Answer[TextChoice], Answer[ChatChoice], Answer[ChunkChoice], Tokens, Detokenized, ModelList, ErrorBody)


def _schema(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": _REFERENCE + name}}


def _body(kind: type[BaseModel]) -> dict[str, Any]:
    content = {"application/json": _schema(kind.__name__)}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}}


def _answers(kind: Any, *failures: int) -> dict[int | str, dict[str, Any]]:
    (reference,), _ = msgspec.json.schema_components([kind], ref_template=_REFERENCE + "{name}")
    content: dict[str, Any] = {"application/json": {"schema": reference}}
    if kind in (Answer[TextChoice], Answer[ChatChoice]):
        content["text/event-stream"] = {}  # events whose data are chunks, the last `[DONE]`
    return {200: {"description": "The answer.", "content": content}, **_errors(*failures)}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": _schema("ErrorBody")}
    return {status: {"description": "Why not.", "content": content} for status in statuses}


def _described(app: FastAPI, plain: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """FastAPI's document with the schemas of our bodies."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            _, bodies = models_json_schema(
                [(kind, "validation") for kind in _BODIES], ref_template=_REFERENCE + "{model}"
            )
            _, structs = msgspec.json.schema_components(_ANSWERS, ref_template=_REFERENCE + "{name}")
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for body in bodies["$defs"].values():
                _add_ranges(body["properties"])
            schemas.update(bodies["$defs"])
            schemas.update(structs)
            app.openapi_schema = document
        return app.openapi_schema

    return openapi


def _add_ranges(properties: dict[str, Any]) -> None:
    """What `SamplingParams` will check, so that clients can read it; chat's `logprobs` is a switch."""
    for name in RANGES.keys() & properties.keys():
        for form in properties[name].get("anyOf", ()):
            if form.get("type") in ("integer", "number") and "minimum" not in form:
                low, high = RANGES[name]
                form["minimum"] = 0 if name == "max_tokens" else low  # 0 with echo
                if high < math.inf:
                    form["maximum"] = high
