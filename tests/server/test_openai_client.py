"""The official `openai` client, sync and async, against a uvicorn server: every endpoint, streams, errors by class."""

import asyncio

import openai
import pytest
from api_server import NAME, Room, api, refused, serving
from ingot import LLM, AsyncLLM, SamplingParams

PROMPT = "def main():\n"
CHAT = [{"role": "user", "content": "print hello"}]
KEY = "sk-test"


@pytest.fixture(scope="module")
def room():
    return Room()


@pytest.fixture(scope="module")
def url(engine, room):
    llm = AsyncLLM(engine)
    app, _ = api(llm, room, api_keys=(KEY,), max_body_bytes=100_000)
    with serving(app) as address:
        yield f"{address}/v1"
    asyncio.run(llm.close())


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def offline(engine):
    """Greedy texts: of the prompt, and of the chat."""
    params = SamplingParams(temperature=0, max_tokens=20)
    with LLM(engine) as llm:
        one = llm.generate(PROMPT, params, progress=False)[0].outputs[0].text
        return one, llm.chat(CHAT, params, progress=False)[0].outputs[0].text


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "ingot"


def test_completions(client, offline):
    found = client.completions.create(model=NAME, prompt=PROMPT, temperature=0, max_tokens=20, logprobs=1, user="me")
    assert found.choices[0].text == offline[0] and found.choices[0].finish_reason == "length"
    assert len(found.choices[0].logprobs.tokens) == found.usage.completion_tokens == 20
    stream = client.completions.create(
        model=NAME, prompt=PROMPT, temperature=0, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == offline[0]
    assert last.usage.completion_tokens == 20 and not last.choices


def test_chat(client, offline):
    found = client.chat.completions.create(
        model=NAME, messages=CHAT, temperature=0, max_completion_tokens=20, logprobs=True, top_logprobs=2, n=2, seed=1,
        response_format={"type": "text"}, extra_body={"top_k": 5},
    )  # fmt: skip
    assert [choice.message.content for choice in found.choices] == [offline[1]] * 2
    assert len(found.choices[0].logprobs.content) == 20
    assert found.usage.prompt_tokens_details.cached_tokens >= 0
    text = ""
    with client.chat.completions.create(model=NAME, messages=CHAT, temperature=0, max_tokens=20, stream=True) as stream:
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text == offline[1] and chunk.choices[0].finish_reason == "length"


def test_the_stream_helper_puts_the_answer_together(client, offline):
    with client.chat.completions.stream(model=NAME, messages=CHAT, temperature=0, max_tokens=20) as stream:
        kinds = {event.type for event in stream}
    assert {"chunk", "content.delta"} <= kinds
    assert stream.current_completion_snapshot.choices[0].message.content == offline[1]


def test_raw_responses(client):
    raw = client.completions.with_raw_response.create(
        model=NAME, prompt=PROMPT, max_tokens=2, extra_headers={"X-Request-Id": "abc-1"}
    )
    assert raw.headers["x-request-id"] == "abc-1" and raw.parse().id == "cmpl-abc-1"
    assert raw.parse()._request_id == "abc-1"


def test_errors_are_the_clients_classes(client, url, room):
    def complete(client=client, **changes):
        return client.completions.create(**{"model": NAME, "prompt": PROMPT, "max_tokens": 2, **changes})

    with pytest.raises(openai.BadRequestError, match="temperature is -1") as found:
        complete(temperature=-1)
    assert found.value.param == "temperature" and found.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="did you mean top_p"):
        complete(extra_body={"topp": 1})
    with pytest.raises(openai.NotFoundError, match="does not exist") as found:
        complete(model="gpt-5")
    assert found.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError, match="100000 bytes") as found:
        complete(prompt="x" * 200_000)
    assert found.value.status_code == 413
    with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError, match="API key"):
            complete(stranger)
    room.refusal = refused(429, "The server is full.", 1)
    try:
        with pytest.raises(openai.RateLimitError, match="full"):
            complete()
        room.refusal = refused(503, "The server is shutting down.")
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            complete(stream=True)
    finally:
        room.refusal = None


def test_the_async_client(url, offline):
    async def scenario():
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            options = {"model": NAME, "temperature": 0, "max_tokens": 20}
            assert [model.id async for model in client.models.list()] == [NAME]
            plain, chat = await asyncio.gather(
                client.completions.create(prompt=PROMPT, **options),
                client.chat.completions.create(messages=CHAT, **options),
            )
            assert (plain.choices[0].text, chat.choices[0].message.content) == offline
            texts = ["", ""]
            async for chunk in await client.completions.create(prompt=PROMPT, stream=True, **options):
                texts[0] += chunk.choices[0].text
            async for chunk in await client.chat.completions.create(messages=CHAT, stream=True, **options):
                texts[1] += chunk.choices[0].delta.content or ""
            assert tuple(texts) == offline
            with pytest.raises(openai.BadRequestError, match="max_tokens is 0"):
                await client.completions.create(model=NAME, prompt=PROMPT, max_tokens=0)

    asyncio.run(scenario())
