"""``ragblend precompute``: compile the KV of documents ahead of any question, in one go or in many."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.options import Config, DataDir, EngineName, Json, Model, read_settings
from app.cli.output import Meter, note, print_json, quiet_engines, say, stdout_is_for_results

if TYPE_CHECKING:
    from app.precompute import PrecomputeReport
    from app.service import Service
    from app.settings import Settings

RESUME = "precompute: interrupted after a finished pass; run the same command again to go on"


def add_to(app: typer.Typer) -> None:
    app.command()(precompute)


def precompute(
    collection: Annotated[str | None, typer.Option("--collection", help="One collection.  [default: all]")] = None,
    only_missing: Annotated[
        bool, typer.Option("--only-missing/--all", help="Skip what is stored, or compile everything again.")
    ] = True,
    refresh_neighbours: Annotated[
        bool,
        typer.Option(
            "--refresh-neighbours", help="Search every chunk's neighbours again (compile.context neighbours only)."
        ),
    ] = False,
    max_gib: Annotated[float | None, typer.Option("--max-gib", help="Write at most this much, then stop.")] = None,
    data_dir: DataDir = None,
    model: Model = None,
    engine: EngineName = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Compile the KV of ingested documents, so that the first question over them is fast.

    Ctrl-C finishes the running pass; the next run goes on where this one stopped. A server may run meanwhile.
    Exit code 1 if chunks failed, 130 after Ctrl-C.
    """
    settings = read_settings(config, data_dir=data_dir, model=model, engine=engine)
    quiet_engines(settings.model)
    seen: list[PrecomputeReport] = []
    interrupted = False
    with stdout_is_for_results():
        try:
            asyncio.run(
                _precompute(
                    settings,
                    seen,
                    collection=collection,
                    only_missing=only_missing,
                    refresh_neighbours=refresh_neighbours,
                    max_gib=max_gib,
                )
            )
        except KeyboardInterrupt:
            interrupted = True
    if interrupted and not seen:
        raise KeyboardInterrupt
    report = seen[-1]
    print_json(view(report, interrupted=interrupted)) if as_json else say(line(report))
    if report.stopped:
        note(f"precompute: stopped, {report.stopped}")
    elif report.error:
        note(f"precompute: the last failure was: {report.error}")
    if interrupted:
        note(RESUME)
        raise typer.Exit(130)
    if report.failed:
        raise typer.Exit(1)


async def _precompute(settings: Settings, seen: list[PrecomputeReport], **options: Any) -> None:
    from app.service import Service

    service = await Service.open(settings, jobs=False)
    try:
        await run_with_meter(service, seen, **options)
    finally:
        await service.close()


async def run_with_meter(service: Service, seen: list[PrecomputeReport], **options: Any) -> None:
    """Precompute with a progress bar. ``seen`` gets the report at the first pass, so it outlives an interruption."""
    from app.precompute import precompute as run

    with Meter("precompute", 0) as meter:

        def tell(report: PrecomputeReport, total: int) -> None:
            seen[:] = [report]
            meter(line(report), done=report.chunks, total=total)

        seen[:] = [await run(service, progress=tell, **options)]


def line(report: PrecomputeReport) -> str:
    """One line of figures. Tokens per second count what ran through the model."""
    rate = report.tokens / report.seconds if report.seconds else 0.0
    counts = f"done {report.done}, skipped {report.skipped}, failed {report.failed}"
    if report.refused:
        counts += f", refused by a full store {report.refused}"
    if report.cascaded or report.removed:
        counts += f"; {report.cascaded} behind new neighbours, {report.removed} stale removed"
    return f"{counts}; {report.bytes / 2**30:.3f} GiB, {rate:.0f} tokens/s"


def view(report: PrecomputeReport, *, interrupted: bool = False) -> dict[str, Any]:
    """The figures as data."""
    return {
        "done": report.done,
        "skipped": report.skipped,
        "refused": report.refused,
        "failed": report.failed,
        "cascaded": report.cascaded,
        "removed": report.removed,
        "gib": report.bytes / 2**30,
        "tokens": report.tokens,
        "seconds": report.seconds,
        "tokens_per_s": report.tokens / report.seconds if report.seconds else 0.0,
        "stopped": report.stopped,
        "error": report.error,
        "interrupted": interrupted,
    }
