"""A server over the trivial engine, in a process of its own: ``python trivial_server.py PORT``, until stdin ends."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

import uvicorn

from app.server import create_app
from app.service import Service
from app.settings import load_settings
from app.trivial import TrivialEngine
from store import open_store


async def run(port: int) -> None:
    """Serve the data directory of the settings; says ``ready`` when it listens."""
    settings = load_settings()
    # The trivial engine knows its KV to the bit.
    engine = TrivialEngine(open_store(replace(settings.store_config, codec="raw")))
    service = await Service.open(settings, engine=engine, tokenizer=engine.tokenizer)
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=port, log_level="error", lifespan="off"))
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await task
    await service.close()


if __name__ == "__main__":
    asyncio.run(run(int(sys.argv[1])))
