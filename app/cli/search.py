"""``ragblend search``: what retrieval finds, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.options import Collection, Config, DataDir, Json, read_settings
from app.cli.output import print_json, print_table, quiet_engines, say, stdout_is_for_results

if TYPE_CHECKING:
    from app.settings import Settings
    from retriever.types import Hit

SHOWN = 100


def add_to(app: typer.Typer) -> None:
    app.command()(search)


def search(
    query: Annotated[str, typer.Argument(help="What to look for.", show_default=False)],
    collection: Collection = "default",
    k: Annotated[int | None, typer.Option("-k", "--limit", min=1, help="Chunks to find.")] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="hybrid, dense or text.")] = None,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Find chunks in a collection; nothing is generated."""
    settings = read_settings(config, data_dir=data_dir, retrieval={"mode": mode} if mode else None)
    quiet_engines(settings.model)
    with stdout_is_for_results():
        hits = _search(settings, query, collection, k or settings.retrieval.max_num_results)
    if as_json:
        print_json({"query": query, "collection": collection, "results": [_view(hit) for hit in hits]})
    elif hits:
        rows = [[f"{h.score:.3f}", h.document.filename, _line(h.chunk.text)] for h in hits]
        print_table("", ["score", "file", "text"], rows, numbers=3)
    else:
        say("nothing was found")


def _search(settings: Settings, query: str, collection: str, k: int) -> list[Hit]:
    from retriever.embed import open_embedder
    from retriever.retriever import Retriever

    # Nothing is chunked here, so no tokenizer is needed to count with.
    with Retriever.open(settings.index_dir, open_embedder(settings.embedder), len) as retriever:
        return retriever.search([collection], query, k=k, mode=settings.retrieval.mode)


def _view(hit: Hit) -> dict[str, object]:
    return {
        "score": hit.score,
        "chunk_id": hit.chunk.id,
        "file_id": hit.document.id,
        "filename": hit.document.filename,
        "title": hit.document.title,
        "page": hit.chunk.page,
        "heading": hit.chunk.heading,
        "text": hit.chunk.text,
    }


def _line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= SHOWN else f"{flat[: SHOWN - 1]}…"
