"""``ragblend bench ttft``: time to first token, measured after the outputs were checked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.bench_store import store
from app.cli.novelty import novelty
from app.cli.options import Config, EngineName, Json, ManyCommand, Model, help_alone, read_settings
from app.cli.output import Meter, note, print_json, print_table, quiet_engines, stdout_is_for_results

if TYPE_CHECKING:
    from app.bench.ttft import Arm, Setup
    from app.settings import Settings

group = typer.Typer(help="Measure.", rich_markup_mode=None)


def add_to(app: typer.Typer) -> None:
    group.command("novelty")(novelty)
    group.command("store", cls=ManyCommand)(store)
    app.add_typer(group, name="bench")


@group.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    """Measure."""
    help_alone(context)


@group.command(cls=ManyCommand)
def ttft(
    context: Annotated[int, typer.Option("--context", help="Context tokens of each request.")] = 2048,
    chunk: Annotated[int, typer.Option("--chunk", help="Tokens of each chunk.")] = 256,
    ratio: Annotated[list[float] | None, typer.Option("--ratio", help="Recompute ratios.  [default: 0.15]")] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed requests of each arm.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random contexts.")] = 0,
    tier: Annotated[
        list[str] | None,
        typer.Option("--tier", help="Where chunks lie: ram, ssd (page cache dropped).  [default: as it comes]"),
    ] = None,
    synthetic: Annotated[
        bool,
        typer.Option("--synthetic", help="Time a 0.46 B model with random weights (made once, in the cache folder)."),
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled/--no-compiled", help="Also start vLLM with torch.compile, for full-compiled.")
    ] = True,
    model: Model = None,
    engine: EngineName = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Time to first token of full prefill, prefix-cache hit, reuse, deviation and auto, in one run.

    Every arm first shows that with everything recomputed it gives full prefill's greedy tokens; an arm that does not
    gets no times. Arms are interleaved on fresh random contexts.
    """
    from app.bench.ttft import Setup, ratios_to_full

    settings = read_settings(config, model=model, engine=engine)
    setup = Setup(context, chunk, tuple(ratio or [0.15]), repeats, seed, tuple(tier or ()))
    quiet_engines(settings.model)
    with stdout_is_for_results():
        path = _synthetic(settings) if synthetic else settings.model
        arms, machine = asyncio.run(_measure(settings, path, setup, compiled=compiled))
    reports = [arm.report() for arm in arms]
    for arm in arms:
        if arm.problem:
            note(f"no times for {arm.name}{f' {arm.ratio:g}' if arm.ratio else ''}: {arm.problem}")
    if as_json:
        print_json({"arms": reports, "context": context, "chunk": chunk, "machine": machine})
    else:
        relative = list(ratios_to_full(reports).values())
        columns = ("ratio", "ttft_median_s", "ttft_p10_s", "ttft_p90_s")
        rows = [
            [r["name"], r["tier"], *(_digits(r[c]) for c in columns), _digits(x)]
            for r, x in zip(reports, relative, strict=True)
        ]
        title = f"TTFT, {context} context tokens in chunks of {chunk}, {repeats} repeats, {machine['model']}"
        print_table(title, ["arm", "tier", "ratio", "median s", "p10", "p90", "of full"], rows)
    if any(arm.problem for arm in arms):
        raise typer.Exit(1)


async def _measure(settings: Settings, model: str, setup: Setup, *, compiled: bool) -> tuple[list[Arm], dict[str, Any]]:
    """All arms measured, and the machine. vLLM runs twice: compiled for all arms, then eager for full prefill."""
    from app.bench.machine import describe_machine
    from app.bench.ttft import make_arms, run_ttft
    from app.bench.workbench import load_tokenizer, resolve_engine, throwaway_engine

    runs: list[tuple[dict[str, Any] | None, list[Arm]]] = [(None, make_arms("full-eager", setup, prefix_hit=False))]
    if resolve_engine(settings.engine) == "vllm":
        runs = [({"enforce_eager": not compiled}, make_arms("full-compiled", setup, prefix_hit=True))]
        if compiled:
            runs.append(({"enforce_eager": True}, make_arms("full-eager", setup, prefix_hit=True)[:1]))
        else:
            runs[0][1][0].name = "full-eager"
    tokenizer = load_tokenizer(model)
    reference = None
    with Meter("bench", sum(len(arms) for _, arms in runs) * (setup.repeats + 1)) as meter:
        for options, arms in runs:
            async with throwaway_engine(settings, model=model, options=options) as opened:
                info = opened.info
                reference = await run_ttft(
                    opened, tokenizer, arms, setup, reference=reference, progress=lambda text: meter(text)
                )
    machine = describe_machine() | {"engine": f"{info.name} {info.version}", "model": Path(model).name}
    return [arm for _, arms in runs for arm in arms], machine


def _synthetic(settings: Settings) -> str:
    from app.bench.synthetic import Shape, synthetic_model

    note("bench: making the synthetic model, if it is not there")
    return str(synthetic_model(Shape(), Path(settings.model)))


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
