"""What the tests of the HTTP API share: the draft engine, open in this process, and a client of its application.

A file that wants another engine or client has a fixture of the same name.
"""

import asyncio

import pytest
from api_server import api, cast
from ingot import AsyncLLM
from starlette.testclient import TestClient


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return cast(tmp_path_factory.mktemp("engines") / "draft")


@pytest.fixture(scope="module")
def llm(engine):
    llm = AsyncLLM(engine)
    yield llm
    asyncio.run(llm.close())


@pytest.fixture(scope="module")
def client(llm):
    app, room = api(llm)
    with TestClient(app, headers={"content-type": "application/json"}) as client:
        client.room = room
        yield client
