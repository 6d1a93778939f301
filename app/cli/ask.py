"""``ragblend ask``: one question over a collection, by a running server or in this process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.options import Collection, Config, DataDir, EngineName, Json, Model, Url, read_settings
from app.cli.output import note, print_json, quiet_engines, say, stdout_is_for_results
from app.cli.talk import find_server

if TYPE_CHECKING:
    from app.settings import Settings


def add_to(app: typer.Typer) -> None:
    app.command()(ask)


def ask(
    question: Annotated[str, typer.Argument(help="What to ask.", show_default=False)],
    collection: Collection = "default",
    mode: Annotated[str | None, typer.Option("--mode", help="auto, blend, reuse or full.")] = None,
    selector: Annotated[str | None, typer.Option("--selector", help="What chooses the rows to recompute.")] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="Share of the context to recompute.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 256,
    url: Url = None,
    data_dir: DataDir = None,
    model: Model = None,
    engine: EngineName = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Answer a question from the documents of a collection, with citations and what the cache did."""
    settings = read_settings(config, data_dir=data_dir, model=model, engine=engine)
    blend = {"mode": mode, "selector": selector, "recompute_ratio": ratio}
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_completion_tokens": max_tokens,
        "temperature": 0.0,
        "rag": {"vector_store_ids": [collection], "blend": {k: v for k, v in blend.items() if v is not None}},
    }
    server = find_server(settings, url)
    if server is not None:
        with server:
            answer = server.chat(body)
    else:
        note("ask: no server is running, starting the engine in this process")
        quiet_engines(settings.model)
        with stdout_is_for_results():
            answer = asyncio.run(_ask_here(settings, body))
    if as_json:
        print_json(answer)
    else:
        show(answer)


def show(answer: dict[str, Any]) -> None:
    """The answer, the sentences it rests on, and one line about the cache."""
    message = answer["choices"][0]["message"]
    say(message["content"].strip())
    quotes = dict.fromkeys((a["quote"], a["filename"], a["page"]) for a in message.get("annotations") or [])
    for number, (quote, filename, page) in enumerate(quotes, 1):
        where = f"{filename}, page {page}" if page else filename
        say(f'  [{number}] "{" ".join(quote.split())}" ({where})')
    rag = answer.get("rag") or {}
    cache, ttft = rag.get("cache"), rag.get("timings_ms", {}).get("ttft")
    parts = []
    if cache:
        counts = ", ".join(f"{cache[name]} {name}" for name in ("reused", "recomputed", "missing"))
        parts.append(f"{cache['mode']}: {cache['tokens']} context rows, {counts}")
    if ttft is not None:
        parts.append(f"first token after {ttft:.0f} ms")
    if parts:
        say(f"  {'; '.join(parts)}")


async def _ask_here(settings: Settings, body: dict[str, Any]) -> dict[str, Any]:
    from app.chat import complete
    from app.schema.chat import ChatRequest
    from app.service import Service

    service = await Service.open(settings, jobs=False)
    try:
        return await complete(service, ChatRequest.model_validate({"model": settings.served_name, **body}))
    finally:
        await service.close()
