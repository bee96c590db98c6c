"""What the tests of the HTTP API share: an engine, doubles for admission and metrics, a scripted engine, a server.

The engine is the embedded draft checkpoint, cast by hand in a moment, on the CPU executor.
"""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn
from hand_made import DEMO, cast_llama
from ingot.runtime.request import CompletionOutput, RequestOutput
from ingot.runtime.server.app import create_app
from ingot.runtime.server.config import ServerConfig
from ingot.runtime.server.errors import Refused

NAME = "pycoder-draft"
COMPLETE, CONVERSE = "/v1/completions", "/v1/chat/completions"
CHAT = [{"role": "user", "content": "print hello"}]
# a template with all that templates of larger models have: tools, tool calls, reasoning effort, an opened <think>
TEMPLATE = (
    "{% if tools %}<|user|>tools: {{ tools | tojson }}<|end|>{% endif %}"
    "{% if reasoning_effort %}effort {{ reasoning_effort }}\n{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.items() | list }}){% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% if thinking %}<think>\n{% endif %}{% endif %}"
)


def cast(folder: Path, template: str | None = None) -> Path:
    """An engine of the draft checkpoint in float32."""
    checkpoint = DEMO / "pycoder-draft-2m"
    if template is not None:
        checkpoint = shutil.copytree(checkpoint, folder.with_name(folder.name + "-checkpoint"))
        (checkpoint / "chat_template.jinja").write_text(template)
    return cast_llama(checkpoint, folder)


class Room:
    """Admission that counts what is inside, and refuses when told to."""

    def __init__(self):
        self.accepting, self.refusal = True, None
        self.inside, self.admitted, self.num_started = 0, [], 0

    @asynccontextmanager
    async def admit(self, num_tokens, num_sequences=1):
        if self.refusal:
            raise self.refusal
        self.admitted.append((num_tokens, num_sequences))
        self.inside += 1
        try:
            yield self
        finally:
            self.inside -= 1

    def started(self):
        self.num_started += 1


class Page:
    """Metrics."""

    content_type = "text/plain; version=0.0.4"
    text = b"ingot:steps_total 1\n"

    async def page(self):
        return self.text


class Scripted:
    """An engine that says what it is told to: text, or an exception to be raised. Everything else is `llm`'s."""

    def __init__(self, llm, *script, text=None):
        self._llm, self.script, self.asked = llm, script, []
        self.text = text or llm.text

    def __getattr__(self, name):
        return getattr(self._llm, name)

    async def generate(self, prompt, params, request_id, *, priority=0, deltas=False):
        assert deltas
        self.asked.append((prompt, params, request_id, priority))
        for i, said in enumerate(self.script):
            if isinstance(said, Exception):
                raise said
            last = i == len(self.script) - 1
            answer = CompletionOutput(0, said, [7], finish_reason="stop" if last else None)
            yield RequestOutput(request_id, prompt["prompt"], prompt["prompt_token_ids"], [answer], last)


def api(llm, room=None, **config):
    """The application and its admission."""
    room = room or Room()
    config = ServerConfig(engine=Path(NAME), served_model_name=NAME, **config)
    return create_app(llm, config, room, Page()), room


@contextmanager
def process_serving(engine, *options, says="4096 tokens of context"):
    """`ingot serve` as a process that is ready, and its base URL."""
    command = [sys.executable, "-m", "ingot", "serve", str(engine), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith(f"ingot serves {Path(engine).name} at http://127.0.0.1:"), line + process.stderr.read()
        assert says in line
        yield process, re.search(r"http://127.0.0.1:\d+", line)[0]
    finally:
        process.kill()
        process.communicate()


@contextmanager
def serving(app):
    """The base URL of a uvicorn server in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def events(response):
    """The JSON values of a stream that must end as OpenAI's do."""
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""], blocks[-3:]
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def refused(status, message, retry_after=None):
    return Refused(status, message, retry_after)
