"""The router on the wire, before servers that do what a test tells them: what passes, what is tried again, what clients
are told when nothing helps."""

import asyncio
import json
import socket

import pytest
from ingot.runtime.server.router import backends, upstream
from stub_backend import EVENT_STREAM, Stub, answer, asynchronous, chunk, routing, say, until

PATH = "/v1/completions"
BODY = {"prompt": "hello", "stream": True}


def says(*raw, after=None):
    """A script that writes raw bytes, and then closes the connection or waits for `after`."""

    async def script(stub, asked, writer):
        await say(writer, *raw)
        if after:
            await after.wait()
        return False

    return script


def counts(router, stub):
    return next(b.counts for b in router.fleet.backends if b.url == stub.url)


def idle(router):
    return all(b.num_open == b.num_sequences == b.num_tokens == 0 for b in router.fleet.backends)


@asynchronous
async def test_requests_and_answers_pass_unchanged():
    async def script(stub, asked, writer):
        extra = {"x-own": "1", "connection": "x-secret", "x-secret": "2", "keep-alive": "5", "x-request-id": "other"}
        await say(writer, answer(418, b"\x00tea", content_type="text/tea", retry_after="7", **extra))

    stub = Stub(script)
    async with routing(stub) as (client, router):
        headers = {
            "Authorization": "Bearer key", "X-Request-Id": "abc-1", "X-Mine": "yes", "Connection": "X-Drop, keep-alive",
            "X-Drop": "1", "TE": "trailers", "Content-Type": "application/json",
        }  # fmt: skip
        body = b'{ "prompt":"\xc3\xa9", "priority": -3}'
        response = await client.post("/v1/a%2Fb?c=%20d", content=body, headers=headers)
        assert response.status_code == 418 and response.content == b"\x00tea"
        assert response.headers["retry-after"] == "7" and response.headers["x-own"] == "1"
        assert response.headers["x-request-id"] == "abc-1" and response.headers["content-type"] == "text/tea"
        assert "x-secret" not in response.headers and "keep-alive" not in response.headers
        [(method, target, seen, got)] = stub.asked
        assert (method, target, got) == ("POST", "/v1/a%2Fb?c=%20d", body)
        assert seen["authorization"] == "bearer key" and seen["x-request-id"] == "abc-1" and seen["x-mine"] == "yes"
        assert seen["host"] == stub.url.removeprefix("http://")
        assert not {"x-drop", "te", "connection", "transfer-encoding"} & set(seen)
        assert idle(router)


@asynchronous
async def test_which_paths_are_whose():
    stub = Stub()
    async with routing(stub) as (client, _):
        for path in ("/", "/page/app.js", "/v1/models", "/v1/x/y", "/tokenize", "/version", "/openapi.json"):
            assert (await client.get(path)).text == stub.url, path
        assert len(stub.asked) == 7
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert (await client.get("/ready")).json() == {"status": "ready", "ready": 1, "backends": 1}
        missing = await client.get("/etc/passwd")
        assert missing.status_code == 404 and missing.json()["error"]["type"] == "invalid_request_error"
        head = await client.head("/page/x")
        assert head.content == b"" and head.headers["content-length"] == str(len(stub.url))
        page = (await client.get("/metrics")).text
        assert f'ingot:router_requests_total{{backend="{stub.url}"}} 8.0' in page
        assert f'ingot:router_backend_ready{{backend="{stub.url}"}} 1.0' in page and "replica" not in page
        assert len(stub.asked) == 8


@asynchronous
async def test_a_stream_passes_byte_for_byte_as_it_comes():
    steps = [asyncio.Event() for _ in range(4)]
    events = [b'data: {"a": 1}\n\n', b": note\r\n\r\ndata: \xff\x00\n\nda", b"ta: 2\n\n", b"data: [DONE]\n\nrest"]

    async def script(stub, asked, writer):
        await say(writer, EVENT_STREAM.encode())
        for step, data in zip(steps, events, strict=True):
            await step.wait()
            await say(writer, chunk(data))
        await say(writer, chunk(b""))

    async with routing(Stub(script)) as (client, router):
        steps[0].set()
        got = b""
        async with client.stream("POST", PATH, json=BODY) as response:
            assert response.headers["content-type"] == "text/event-stream"
            pieces = response.aiter_raw()
            for i in range(4):  # each event is there before the next is written
                while len(got) < len(b"".join(events[: i + 1]).rpartition(b"\n")[0]) + 1:
                    got += await anext(pieces)
                steps[min(i + 1, 3)].set()
            got += b"".join([piece async for piece in pieces])
        assert got == b"".join(events)
        await until(lambda: idle(router))


@asynchronous
async def test_a_slow_client_slows_the_server():
    written = 0

    async def script(stub, asked, writer):
        nonlocal written
        await say(writer, EVENT_STREAM.encode())
        for _ in range(400):
            await say(writer, chunk(b"data: " + b"x" * 100_000 + b"\n\n"))
            written += 1
        await say(writer, chunk(b""))

    async with routing(Stub(script)) as (client, _):
        async with client.stream("POST", PATH, json=BODY) as response:
            stopped = -1
            while stopped != written:
                stopped = written
                await asyncio.sleep(0.5)
            assert stopped < 300  # what fits into the buffers of sockets, and no more
            assert sum([len(piece) async for piece in response.aiter_raw()]) == 400 * 100_008


@asynchronous
async def test_a_client_that_leaves_is_gone_for_the_server():
    never = asyncio.Event()
    streams = Stub(says(EVENT_STREAM.encode() + chunk(b"data: 1\n\n"), after=never))
    async with routing(streams) as (client, router):
        async with client.stream("POST", PATH, json=BODY) as response:
            await anext(response.aiter_raw())
        await until(lambda: streams.closed == 1 and idle(router))
        streams.script = says(after=never)  # one that has not begun to answer
        asking = asyncio.ensure_future(client.post(PATH, json=BODY))
        await until(lambda: len(streams.asked) == 2)
        asking.cancel()
        await until(lambda: streams.closed == 2 and idle(router))
        assert counts(router, streams).errors == 0


@pytest.mark.parametrize("raw", [
    b"", b"HTTP/1.1 200 OK\r\nconte", answer(200, b"x" * 99)[:-9], EVENT_STREAM.encode(),
    EVENT_STREAM.encode() + chunk(b"data: ha"), b"SSH-2.0\r\n\r\n",
])  # fmt: skip
@asynchronous
async def test_what_breaks_before_the_answer_begins_is_asked_again(raw):
    broken, whole = Stub(says(raw)), Stub()
    async with routing(broken, whole) as (client, router):
        for i in range(40):
            response = await client.post(PATH, json={"prompt": str(i)})
            assert response.status_code == 200 and response.text == whole.url
            await until(lambda: router.fleet.num_ready == 2)  # it says that it is ready
        assert broken.asked and len(whole.asked) == 40
        found = counts(router, broken)
        assert found.errors == found.retries == found.requests == len(broken.asked)
        assert idle(router)


@asynchronous
async def test_a_connection_that_was_closed_while_idle_is_replaced(monkeypatch):
    monkeypatch.setattr(upstream, "IDLE", 60.0)

    async def script(stub, asked, writer):
        if len(stub.asked) % 3 == 2:
            return False
        await say(writer, answer(200))

    stub = Stub(script)
    async with routing(stub) as (client, router):
        for _ in range(10):
            assert (await client.get("/v1/models")).status_code == 200
        assert len(stub.asked) == 15 and counts(router, stub).errors == 0 and counts(router, stub).retries == 5


@asynchronous
async def test_a_refusal_after_a_broken_connection_is_passed_on(monkeypatch):
    monkeypatch.setattr(upstream, "IDLE", 60.0)

    async def script(stub, asked, writer):
        if len(stub.asked) == 2:
            return False
        await say(writer, answer(200 if len(stub.asked) == 1 else 503, retry_after=2))

    stub = Stub(script)
    async with routing(stub) as (client, _):
        assert (await client.get("/v1/models")).status_code == 200
        response = await client.get("/v1/models")
        assert response.status_code == 503 and response.headers["retry-after"] == "2" and len(stub.asked) == 3


@asynchronous
async def test_a_request_that_breaks_two_servers_is_not_given_to_a_third():
    stubs = [Stub(says(b"")) for _ in range(3)]
    async with routing(*stubs) as (client, _):
        response = await client.post(PATH, json=BODY)
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        assert "send the request again" in response.json()["error"]["message"]
        assert sum(len(stub.asked) for stub in stubs) == 2


@pytest.mark.parametrize("last", [b"data: 1\n\n", b"data: 1\n\ndata: {half", b"data: 1\n"])
@asynchronous
async def test_a_stream_that_breaks_ends_with_an_error_event(last):
    stub = Stub(says(EVENT_STREAM.encode() + chunk(last)))
    async with routing(stub, Stub(says(EVENT_STREAM.encode() + chunk(last)))) as (client, router):
        response = await client.post(PATH, json=BODY)
        first, error, end = response.text.split("\n\n")
        assert (response.status_code, first, end) == (200, "data: 1", "")
        assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
        assert sum(b.counts.requests for b in router.fleet.backends) == 1  # not sent twice
        assert sum(b.counts.errors for b in router.fleet.backends) == 1


@asynchronous
async def test_a_long_body_that_breaks_is_seen_to_be_broken():
    async with routing(Stub(says(answer(200, b"x" * (3 << 20))[:-9]))) as (client, _):
        with pytest.raises(Exception, match="peer closed|incomplete|Remote"):
            await client.get("/v1/models")


@asynchronous
async def test_refusals(monkeypatch):
    monkeypatch.setattr(backends, "FULL_FOR", 60.0)

    def full(seconds):
        return answer(429, b'{"error": {"message": "full"}}', retry_after=seconds, content_type="application/json")

    async def ill(stub, asked, writer):
        stub.ready = 503
        await say(writer, answer(503, b'{"error": {"message": "ill"}}', retry_after=3))

    one, other = Stub(says(full(9))), Stub(says(full(4)))
    async with routing(one, other) as (client, router):
        response = await client.post(PATH, json=BODY)  # all full: the soonest
        assert response.status_code == 429 and response.headers["retry-after"] == "4"
        assert response.json() == {"error": {"message": "full"}}
        assert len(one.asked) == len(other.asked) == 1 and router.fleet.num_ready == 2
        assert (await client.post(PATH, json=BODY)).status_code == 429
        assert len(one.asked) + len(other.asked) == 3  # known to be full: one is asked whether it still is
        one.script = lambda stub, asked, writer: say(writer, answer(200, b"one"))
        for backend in router.fleet.backends:
            backend.take()
        for i in range(8):  # one has room: nobody sees a refusal
            assert (await client.post(PATH, json={"prompt": str(i)})).text == "one"
        one.script, other.script = says(full(5)), ill
        for backend in router.fleet.backends:
            backend.take()
        response = await client.post(PATH, json={"prompt": "y"})
        assert response.status_code == 429 and response.headers["retry-after"] == "5"
        await until(lambda: router.fleet.num_ready == 1)
        one.script = ill
        response = await client.post(PATH, json=BODY)  # the server's own words
        assert response.status_code == 503 and response.json() == {"error": {"message": "ill"}}
        assert response.headers["retry-after"] == "3"
        await until(lambda: router.fleet.num_ready == 0)
        assert (await client.get("/ready")).status_code == 503 and (await client.get("/health")).status_code == 200
        response = await client.post(PATH, json=BODY)
        assert response.status_code == 503 and response.json()["error"]["code"] == "unavailable"


@asynchronous
async def test_who_is_not_ready_is_left_out_and_taken_back():
    one, other = Stub(), Stub()
    async with routing(one, other) as (client, router):

        async def answered_by():
            return {(await client.post(PATH, json={"prompt": str(i)})).text for i in range(40)}

        assert await answered_by() == {one.url, other.url}
        one.ready = 503
        await until(lambda: router.fleet.num_ready == 1)
        assert await answered_by() == {other.url}
        one.ready = 200
        await until(lambda: router.fleet.num_ready == 2)
        assert await answered_by() == {one.url, other.url}
        await other.stop()  # connections are refused, and nobody sees it
        assert await answered_by() == {one.url}
        await until(lambda: router.fleet.num_ready == 1)
        await other.start()
        await until(lambda: router.fleet.num_ready == 2)
        assert await answered_by() == {one.url, other.url}


@asynchronous
async def test_a_server_that_is_silent_is_given_up():
    hangs = Stub()
    async with routing(hangs, check_timeout=1.0, silence=1.5) as (client, router):
        await until(lambda: router.fleet.num_ready == 1)
        hangs.script = says(EVENT_STREAM.encode() + chunk(b"data: 1\n\n"), after=asyncio.Event())
        asking = asyncio.ensure_future(client.post(PATH, json=BODY))
        await until(lambda: hangs.asked)
        hangs.refuse()
        with socket.create_server(("127.0.0.1", hangs.port), backlog=64):  # accepts, and says nothing
            response = await asyncio.wait_for(asking, 15)
            assert response.text.startswith("data: 1\n\n") and "server_error" in response.text
        assert idle(router)


@asynchronous
async def test_work_is_shared_and_a_prefix_comes_back():
    release = asyncio.Event()

    async def script(stub, asked, writer):
        await release.wait()
        await say(writer, answer(200, stub.url.encode()))

    one, other = Stub(script), Stub(script)
    async with routing(one, other) as (client, router):
        asking = [asyncio.ensure_future(client.post(PATH, json={"prompt": "same"})) for _ in range(20)]
        await until(lambda: len(one.asked) + len(other.asked) == 20)
        assert len(one.asked) == len(other.asked) == 10
        release.set()
        await asyncio.gather(*asking)
        for i in range(10):
            turns = [{"role": "user", "content": f"{i} " * 2000}]
            first = await client.post("/v1/chat/completions", json={"messages": turns})
            turns.append({"role": "assistant", "content": "so"})
            assert (await client.post("/v1/chat/completions", json={"messages": turns})).text == first.text
        assert counts(router, one).by_prefix + counts(router, other).by_prefix == 10


@asynchronous
async def test_what_others_have_sent_counts():
    one, other = Stub(), Stub()
    one.metrics = b'ingot:num_requests_running{model_name="m"} 7.0\nvllm:num_requests_waiting 2.0\nx:y 1\n'
    async with routing(one, other, follow_load=True) as (client, router):
        await until(lambda: any(b.work == 9 for b in router.fleet.backends))
        assert {(await client.post(PATH, json={"prompt": str(i)})).text for i in range(12)} == {other.url}


@asynchronous
async def test_limits_and_draining():
    hold = asyncio.Event()
    stub = Stub()
    async with routing(stub, max_body_bytes=1000, max_open=1) as (client, router):
        response = await client.post(PATH, json={"prompt": "x" * 2000})
        assert response.status_code == 413 and not stub.asked
        response = await client.post(PATH, json=BODY, headers={"X-Request-Id": "not valid"})
        assert response.status_code == 400 and not stub.asked
        stub.script = says(EVENT_STREAM.encode() + chunk(b"data: 1\n\n"), after=hold)
        asking = asyncio.ensure_future(client.post(PATH, json=BODY))
        await until(lambda: stub.asked)
        assert (await client.get("/v1/models")).status_code == 429
        draining = asyncio.ensure_future(router.admission.drain(30))
        await asyncio.sleep(0)
        assert (await client.get("/v1/models")).status_code == 503 and (await client.get("/ready")).status_code == 503
        assert not draining.done()
        router.abort()
        assert "server_error" in (await asking).text and await draining
