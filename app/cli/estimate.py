"""``ragblend estimate``: what precomputing would take, before any of it is done."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.options import Config, DataDir, EngineName, Json, Model, read_settings
from app.cli.output import Meter, note, print_json, print_table, quiet_engines, say, stdout_is_for_results

if TYPE_CHECKING:
    from app.estimate import Estimator
    from app.offline import Offline
    from app.rates import Rate, Rates
    from app.settings import Settings
    from blend.types import CompileJob
    from retriever.types import Document


def add_to(app: typer.Typer) -> None:
    app.command()(estimate)


def estimate(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Files and folders.  [default: what is ingested and not precomputed]", show_default=False),
    ] = None,
    collection: Annotated[str | None, typer.Option("--collection", help="What is ingested into one.")] = None,
    codec: Annotated[str | None, typer.Option("--codec", help="How it would be stored.  [default: as set]")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Start the engine and time one pass, with a store of its own.")
    ] = False,
    data_dir: DataDir = None,
    model: Model = None,
    engine: EngineName = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Tokens, GiB in every codec, and minutes that precomputing would take; and whether the store has room for it.

    Needs no engine and no server, and changes nothing; the weights are read once, for their fingerprint. Minutes go by
    earlier precompute runs of this model on this machine, or by --measure; without either they are not guessed.
    """
    settings = read_settings(config, data_dir=data_dir, model=model, engine=engine)
    quiet_engines(settings.model)
    with stdout_is_for_results():
        found = _estimate(settings, paths or [], collection, codec, measure)
    if as_json:
        print_json(found)
        return
    from app.estimate import summary

    for line in summary(found):
        say(line)
    rows = [[name, f"{gib:.4g}"] for name, gib in found["gib_by_codec"].items()]
    if found["tokens"]:
        print_table("", ["codec", "GiB"], rows)


def _estimate(
    settings: Settings, paths: Sequence[Path], collection: str | None, codec: str | None, measure: bool
) -> dict[str, Any]:
    from app.estimate import Estimator
    from app.estimate import estimate as weigh
    from app.offline import open_offline
    from app.rates import Rates
    from store.codec import open_codec

    if paths and collection is not None:
        raise typer.BadParameter("files and --collection exclude each other: its documents are ingested already")
    if codec is not None and codec != "auto":
        open_codec(codec)
    rates = Rates(settings.data_dir)
    with open_offline(settings) as offline:
        estimator = Estimator(offline.keys, offline.layout, offline.store, settings)
        if paths:
            estimator.incoming(_documents(paths))
        else:
            _ingested(estimator, offline, collection)
        keys, work = offline.keys, estimator.work
        if measure and work.longest is not None:
            rate: Rate | None = asyncio.run(_measured(settings, rates, keys.prefix_job(), work.longest))
        else:
            rate = rates.find(offline.engine, keys.layout)
        return weigh(work, keys, offline.store, settings, rate, codec).view()


def _ingested(estimator: Estimator, offline: Offline, collection: str | None) -> None:
    if offline.retriever is None or offline.references is None:
        note("estimate: nothing was ingested yet")
        return
    documents = offline.retriever.documents(collection)
    with Meter("estimate", len(documents)) as meter:
        for document in documents:
            estimator.ingested(offline.references, [document])
            meter()


def _documents(paths: Sequence[Path]) -> Iterator[Document]:
    """What the files hold. One that cannot be read is told and passed over, as ingest would."""
    from app.cli.ingest import find_files
    from retriever.errors import ParseError
    from retriever.parse import parse_many

    files = list(find_files(paths))
    with Meter("estimate", len(files)) as meter:
        for path in files:
            try:
                yield from parse_many(path.read_bytes(), path.name)
            except ParseError as e:
                note(f"estimate: {path.name}: {e}")
            meter()


async def _measured(settings: Settings, rates: Rates, first: CompileJob, job: CompileJob) -> Rate:
    """The speed of ``job`` in a fresh engine, the faster of two runs (the first of its size pays for memory, the second
    has nothing left to write); kept for later estimates."""
    from app.bench.workbench import throwaway_engine
    from app.rates import Rate

    note(f"estimate: starting the engine to time a pass of {job.tokens} tokens")
    async with throwaway_engine(settings) as engine:
        await engine.compile(first)
        result = min([await engine.compile(job), await engine.compile(job)], key=lambda r: r.seconds)
        info = engine.info
    rates.learn(info.name, info.layout, info.device, result.tokens, result.seconds)
    return Rate.now(info.name, info.layout, info.device, result.tokens, result.seconds)
