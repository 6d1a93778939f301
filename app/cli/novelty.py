"""``ragblend bench novelty``: does it stay fast when every query is new?"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.options import Config, EngineName, Json, Model, read_settings
from app.cli.output import Meter, note, print_json, print_table, quiet_engines, say, stdout_is_for_results

if TYPE_CHECKING:
    from app.bench.novelty import NoveltySetup, Quarter
    from app.settings import Settings


def novelty(
    queries: Annotated[int, typer.Option("--queries", help="Queries, each with a new order of chunks.")] = 500,
    chunks: Annotated[int, typer.Option("--chunks", help="Chunks of each query.")] = 14,
    chunk: Annotated[int, typer.Option("--chunk", help="Tokens of each chunk.")] = 128,
    pool: Annotated[int, typer.Option("--pool", help="Distinct chunks to draw from.")] = 200,
    zipf: Annotated[float, typer.Option("--zipf", help="Exponent of their popularity.")] = 1.0,
    ram_mib: Annotated[
        float | None,
        typer.Option("--ram-mib", min=0.001, help="Memory tier; smaller than the pool.  [default: a third of it]"),
    ] = None,
    ratio: Annotated[float, typer.Option("--ratio", help="Recompute ratio.")] = 0.1,
    selector: Annotated[str, typer.Option("--selector", help="Selector.")] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Seed of chunks and draws.")] = 0,
    check_every: Annotated[int, typer.Option("--check-every", help="Check outputs every so many queries.")] = 100,
    cold: Annotated[bool, typer.Option("--cold", help="Drop the page cache before each query.")] = False,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="Use the 0.46 B model with random weights.")] = False,
    model: Model = None,
    engine: EngineName = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Time to first token over hundreds of queries that never repeat an order, from a pool larger than memory.

    Fails (exit code 1) if the last quarter's median is more than 1.05 times the second's, or the bytes stored per
    distinct chunk change.
    """
    from app.bench.novelty import NoveltySetup, verdict

    settings = read_settings(config, model=model, engine=engine)
    setup = NoveltySetup(queries, chunks, chunk, pool, zipf, ratio, selector, seed, check_every, cold)
    quiet_engines(settings.model)
    with stdout_is_for_results():
        quarters, machine = asyncio.run(_measure(settings, setup, ram_mib, synthetic=synthetic))
    found = verdict(quarters)
    reports = [quarter.report() for quarter in quarters]
    if as_json:
        print_json({"quarters": reports, **found, "setup": vars(setup), "machine": machine})
    else:
        rows = [
            [i + 1, r["queries"], f"{r['ttft_median_s']:.4g}", _shares(r["tiers"]), f"{r['bytes_per_chunk']:.0f}"]
            for i, r in enumerate(reports)
        ]
        title = f"{queries} queries of {chunks} chunks of {chunk} tokens from {pool}, {machine['model']}"
        print_table(title, ["quarter", "queries", "median TTFT s", "chunks from", "bytes per distinct chunk"], rows)
        say(f"last quarter over second: {found['last_over_second']:.3f}")
    if found["last_over_second"] > 1.05 or not found["bytes_per_chunk_constant"]:
        note("novelty: the gain does not last")
        raise typer.Exit(1)


async def _measure(
    settings: Settings, setup: NoveltySetup, ram_mib: float | None, *, synthetic: bool
) -> tuple[list[Quarter], dict[str, Any]]:
    from app.bench.machine import describe_machine
    from app.bench.novelty import Novelty
    from app.bench.synthetic import Shape, synthetic_model
    from app.bench.workbench import load_tokenizer, stored_bytes, throwaway_engine

    path = str(synthetic_model(Shape(), Path(settings.model))) if synthetic else settings.model
    if ram_mib is None:
        ram_mib = stored_bytes(path, settings, setup.pool * setup.chunk) / 3 / 2**20
    store = settings.store.model_copy(update={"ram_gib": ram_mib / 1024})
    settings = settings.model_copy(update={"store": store})
    with Meter("novelty", setup.pool + setup.queries) as meter:
        async with throwaway_engine(settings, model=path) as engine:
            quarters = await Novelty(engine, load_tokenizer(path), setup).run(lambda text: meter(text))
            info = engine.info
    return quarters, describe_machine() | {"engine": f"{info.name} {info.version}", "model": Path(path).name}


def _shares(tiers: dict[str, float]) -> str:
    return ", ".join(f"{tier} {share:.0%}" for tier, share in tiers.items())
