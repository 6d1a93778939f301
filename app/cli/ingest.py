"""``ragblend ingest``: files and folders into a collection."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.options import Collection, Config, DataDir, EngineName, Json, Model, Url, read_settings
from app.cli.output import Meter, note, print_json, quiet_engines, say, stdout_is_for_results
from app.cli.talk import Server, find_server

if TYPE_CHECKING:
    from app.settings import Settings


class NothingToIngestError(Exception):
    """No file was found; the message says where."""


def add_to(app: typer.Typer) -> None:
    app.command()(ingest)


def ingest(
    paths: Annotated[list[Path], typer.Argument(help="Files, and folders to search for files.", show_default=False)],
    collection: Collection = "default",
    precompute: Annotated[
        bool | None, typer.Option("--precompute/--no-precompute", help="Compile KV now.  [default: as set]")
    ] = None,
    url: Url = None,
    data_dir: DataDir = None,
    model: Model = None,
    engine: EngineName = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Make documents searchable, and compile their KV.

    Goes through a running server if there is one. Formats: txt, md, html, json, jsonl, pdf. In folders, files of other
    kinds are passed over. Exit code 1 if a document failed; the others are kept.
    """
    settings = read_settings(config, data_dir=data_dir, model=model, engine=engine, precompute_on_ingest=precompute)
    files = list(find_files(paths))
    server = find_server(settings, url)
    if server is not None:
        with server:
            jobs = _by_server(server, files, collection)
    else:
        note("ingest: no server is running, working in this process")
        quiet_engines(settings.model)
        with stdout_is_for_results():
            jobs = asyncio.run(_here(settings, files, collection))
    documents = [d for job in jobs for d in job["documents"]]
    errors = [job["last_error"]["message"] for job in jobs if job["last_error"]]
    failed = [d for d in documents if d["error"]]
    cascaded = sum(job["cascaded"] for job in jobs)
    if as_json:
        print_json({"collection": collection, "documents": documents, "cascaded": cascaded, "errors": errors})
    else:
        kept = [d for d in documents if not d["error"]]
        chunks, same = sum(d["chunks"] for d in kept), sum(d["unchanged"] for d in kept)
        done = sum(d["status"] == "precomputed" for d in kept)
        say(f"{len(kept)} documents, {chunks} chunks ({same} unchanged); {done} precomputed, {len(failed)} failed")
        if cascaded:
            say(f"{cascaded} chunks got new neighbours and were compiled again, since one of theirs was changed")
    for d in failed:
        note(f"ingest: {d['filename']}: {d['error']['message']}")
    for error in errors:
        note(f"ingest: {error}")
    if failed or errors:
        raise typer.Exit(1)


def find_files(paths: Sequence[Path]) -> Iterator[Path]:
    """The files of ``paths`` in order; of a folder those that can be read, sorted. Raises if there are none."""
    from retriever.parse import formats

    known = formats()
    for path in paths:
        if not path.exists():
            raise NothingToIngestError(f"{path} does not exist")
        if not path.is_dir():
            yield path
            continue
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in known)
        if not found:
            raise NothingToIngestError(f"{path} holds no file with one of the extensions {' '.join(sorted(known))}")
        yield from found


def _by_server(server: Server, files: Sequence[Path], collection: str) -> list[dict[str, Any]]:
    with Meter("ingest", len(files)) as meter:
        return server.ingest(files, collection, lambda job, before: _tell(meter, job, before))


async def _here(settings: Settings, files: Sequence[Path], collection: str) -> list[dict[str, Any]]:
    """The server's own job, run in this process."""
    from app.ingest import open_collection
    from app.jobs import Item
    from app.service import Service

    service = await Service.open(settings)
    try:
        assert service.jobs is not None
        await asyncio.to_thread(open_collection, service.retriever, collection)
        with Meter("ingest", len(files)) as meter:
            items = [(Item(n, "file", path.name), path.read_bytes()) for n, path in enumerate(files)]
            job = await service.jobs.submit(collection, items)
            while job.finished_at is None:
                _tell(meter, job.view(), 0)
                await asyncio.sleep(0.2)
        return [job.view()]
    finally:
        await service.close()


def _tell(meter: Meter, job: dict[str, Any], before: int) -> None:
    progress = job["progress"] or {}
    text = f"{progress.get('stage', job['state'])} {progress.get('done', 0)}/{progress.get('total', 0)}"
    done = before + (progress.get("done", 0) if progress.get("stage") == "parsing" else job["counts"]["completed"])
    meter(text, done=min(done, meter.total))
