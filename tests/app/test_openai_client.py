"""A real server on a loopback port and the ``openai`` client: sync, async, streaming, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn

from app.errors import StartError
from app.server import create_app, serve
from app.service import Service
from app.trivial import TrivialEngine
from retriever.embed import HashEmbedder
from store.memory import MemoryStore

from .conftest import DOCUMENTS, make_settings

QUESTION = [{"role": "user", "content": "Where was Mara Venn born?"}]
ANSWER = "Mara Venn was a painter."


class Live:
    """A server in a thread with its own event loop."""

    def __init__(self, folder: Path) -> None:
        self.port = 0
        self.engine = TrivialEngine(MemoryStore(), delay_s=0.02)
        self._folder = folder
        self._server: uvicorn.Server | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="server")

    async def _serve(self) -> None:
        service = await Service.open(
            make_settings(self._folder), engine=self.engine, tokenizer=self.engine.tokenizer, embedder=HashEmbedder()
        )
        try:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                self.port = listener.getsockname()[1]
                self._server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning", lifespan="off"))
                self._started.set()
                await self._server.serve(sockets=[listener])
        finally:
            await service.close()
            self._started.set()

    def __enter__(self) -> Live:
        self._thread.start()
        assert self._started.wait(30)
        assert self.port
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def idle_within(self, seconds: float) -> bool:
        """The engine holds no request, at the latest after ``seconds``."""
        end = time.monotonic() + seconds
        while self.engine.running and time.monotonic() < end:
            time.sleep(0.005)
        return not self.engine.running


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with Live(tmp_path_factory.mktemp("live")) as live:
        with openai.OpenAI(base_url=live.url, api_key="none") as client:
            job = client.post("../ingest?wait=true", body={"documents": DOCUMENTS}, cast_to=object)
        assert job["state"] == "precomputed"  # type: ignore[index]
        yield live


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url, api_key="none", max_retries=0) as client:
        yield client


def test_the_sync_client_reads_the_answer_and_everything_beside_it(client: openai.OpenAI) -> None:
    rag = {"vector_store_ids": ["default"], "blend": {"mode": "blend"}}
    answer = client.chat.completions.create(model="trivial", messages=QUESTION, extra_body={"rag": rag})
    message = answer.choices[0].message
    assert message.content == ANSWER
    assert message.annotations is not None
    citation = message.annotations[0]
    assert citation.url_citation.title == "Mara Venn"
    assert citation.file_id == "doc-mara"  # type: ignore[attr-defined]
    assert answer.rag["cache"]["reused"] > 0  # type: ignore[attr-defined]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.rag["cache"]["reused"]  # type: ignore[attr-defined]
    assert client.models.retrieve("trivial:default").id == "trivial:default"
    assert [m.id for m in client.models.list()] == ["trivial", "trivial:default"]


async def test_the_async_client_reads_answers_and_streams(live: Live) -> None:
    async with openai.AsyncOpenAI(base_url=live.url, api_key="none") as client:
        answer, stream = await asyncio.gather(
            client.chat.completions.create(model="trivial:default", messages=QUESTION),
            client.chat.completions.create(model="trivial:default", messages=QUESTION, stream=True),
        )
        assert answer.choices[0].message.content == ANSWER
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == ANSWER


def test_the_stream_carries_rag_first_and_usage_last(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="trivial:default", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].rag["results"][0]["file_id"] == "doc-mara"  # type: ignore[attr-defined]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ANSWER)
    with client.chat.completions.stream(model="trivial:default", messages=QUESTION) as helper:
        assert helper.get_final_completion().choices[0].message.content == ANSWER


def test_the_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="trivial:nowhere", messages=QUESTION)
    assert missing.value.code == "collection_not_found"
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="trivial", messages=QUESTION, temperature=7, stream=True)
    assert bad.value.param == "temperature"


@pytest.mark.parametrize("events", range(1, 8))
def test_a_client_that_leaves_a_stream_frees_the_engine_within_a_second(
    live: Live, client: openai.OpenAI, events: int
) -> None:
    stream = client.chat.completions.create(model="trivial:default", messages=QUESTION, stream=True, n=3)
    for _ in range(events):
        next(iter(stream))
    assert live.engine.running
    stream.close()
    assert live.idle_within(1.0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_word_frees_the_engine(live: Live, stream: bool) -> None:
    body = json.dumps({"model": "trivial", "stream": stream, "messages": [{"role": "user", "content": "word " * 500}]})
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    live.engine.delay_s = 0.2
    try:
        with socket.create_connection(("127.0.0.1", live.port)) as raw:
            raw.sendall((head + body).encode())
            end = time.monotonic() + 5
            while not live.engine.running and time.monotonic() < end:
                time.sleep(0.005)
            assert live.engine.running
        assert live.idle_within(1.0)
    finally:
        live.engine.delay_s = 0.02


async def test_a_taken_port_is_told_before_anything_is_loaded(live: Live, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=f"cannot bind 127.0.0.1:{live.port}"):
        await serve(make_settings(tmp_path / "data", port=live.port))
    assert not (tmp_path / "data").exists()


def test_half_a_request_takes_nothing(live: Live, client: openai.OpenAI) -> None:
    with socket.create_connection(("127.0.0.1", live.port)) as raw:
        raw.sendall(
            b"POST /ingest HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n{"
        )
    assert (
        client.chat.completions.create(model="trivial:default", messages=QUESTION).choices[0].message.content == ANSWER
    )


@pytest.mark.slow
def test_sigterm_stops_the_server_in_order(tmp_path: Path) -> None:
    """It answers until then, and exits with 0: uvicorn alone would die of the signal, its engine not stopped."""
    model = Path(__file__).parents[2] / "models" / "demo"
    arguments = ["--engine", "transformers", "--model", model, "--data-dir", tmp_path, "--port", "0"]
    environment = os.environ | {"RAGBLEND_EMBEDDER": "hash"}
    server = subprocess.Popen(
        [sys.executable, "-c", "from app.cli import main; main()", "serve", *arguments],
        cwd=model.parents[1], env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stderr is not None
    try:
        address = next(line.split()[-1] for line in server.stderr if " on http://" in line)
        assert httpx.get(address + "/livez").status_code == 200
        server.terminate()
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
