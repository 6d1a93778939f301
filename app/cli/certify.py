"""``ragblend certify``: prove a model before ``auto`` blends it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.options import Config, DataDir, EngineName, Json, Model, read_settings
from app.cli.output import Meter, note, print_json, print_table, quiet_engines, say, stdout_is_for_results

if TYPE_CHECKING:
    from app.evaluate.asker import Embed
    from app.evaluate.plan import Plan
    from app.settings import Settings
    from blend.certificate import Certificate, Trial


def add_to(app: typer.Typer) -> None:
    app.command()(certify)


def certify(
    model: Model = None,
    engine: EngineName = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.  [default: the engine's]")
    ] = None,
    compile: Annotated[
        str | None, typer.Option("--compile", help="What chunks are compiled behind.  [default: the settings']")
    ] = None,
    questions: Annotated[int, typer.Option("--questions", help="Questions of each task.")] = 32,
    documents: Annotated[int, typer.Option("--documents", help="Documents (two chunks each) of a context.")] = 4,
    seed: Annotated[int | None, typer.Option("--seed", help="Which generated questions.  [default: 900000]")] = None,
    floor: Annotated[float, typer.Option("--floor", help="Least share of answers equal to full prefill's.")] = 0.97,
    data: Annotated[
        Path | None, typer.Option("--data", help="Ask a file's questions (see eval quality) instead of generated ones.")
    ] = None,
    style: Annotated[str, typer.Option("--style", help="Prompt and metric for --data (see eval quality).")] = "musique",
    out: Annotated[
        Path | None, typer.Option("--out", help="Append answers here (JSON lines); a second run goes on.")
    ] = None,
    into_model: Annotated[
        bool, typer.Option("--into-model", help="Put the certificate into the model folder too, to go with it.")
    ] = False,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Check that blending this model is exact where it must be, find what to recompute, and write its certificate.

    Without a passed certificate for a model (and dtype), mode auto prefills in full. Exit code 1 if it does not pass.
    """
    from app.certify.certify import SEED, make_plan
    from app.evaluate.dataset import read_dataset
    from app.evaluate.errors import EvaluationError
    from app.evaluate.styles import find_style

    if not 0.0 <= floor <= 1.0:
        raise EvaluationError(f"--floor {floor:g} is not within 0..1")
    behind = {"context": compile} if compile else None
    settings = read_settings(config, model=model, data_dir=data_dir, engine=engine, dtype=dtype, compile=behind)
    plan = make_plan(
        settings.compile, seed=SEED if seed is None else seed, questions=questions, documents=documents,
        data=read_dataset(data, find_style(style)) if data else None,
    )  # fmt: skip
    quiet_engines(settings.model)
    with stdout_is_for_results():
        certificate, written = asyncio.run(_certify(settings, plan, floor, out, into_model=into_model))
    if as_json:
        import dataclasses

        print_json(dataclasses.asdict(certificate) | {"files": [str(path) for path in written]})
    else:
        _show(certificate)
        for path in written:
            note(f"certify: wrote {path}")
    if not certificate.passed:
        raise typer.Exit(1)


async def _certify(
    settings: Settings, plan: Plan, floor: float, out: Path | None, *, into_model: bool
) -> tuple[Certificate, list[Path]]:
    from app.bench.workbench import load_tokenizer, throwaway_engine
    from app.certify.certify import certify as run
    from app.certify.exactness import CHECKS, check_exactness
    from app.certify.lookup import compiled_behind, in_data, in_model
    from blend.certificate import write

    embed: Embed | None = None
    if "neighbours" in plan.compiles:
        from retriever.embed import open_embedder

        embed = open_embedder(settings.embedder).embed
    if out:
        note(f"certify: answers go to {out}; run the same command again to go on after an interruption")
    options = settings.engine_options
    with Meter("certify", len(CHECKS) + len(plan.indices) * len(plan.source.tasks)) as meter:
        # Exactness looks into the store for what was computed, so that one lies in a folder, unchanged by a codec; the
        # many chunks of the calibration come and go, so theirs is one that drops the oldest, which with vLLM nobody
        # outside its worker can read.
        async with throwaway_engine(settings, options=options, codec="raw") as engine:
            info, tokenizer = engine.info, load_tokenizer(settings.model)
            note(f"certify: {settings.model} in {info.layout.dtype} on {info.name} {info.version}, {info.device}")
            checks = await check_exactness(engine, tokenizer, seed=plan.seed, progress=lambda text: meter(text))
        async with throwaway_engine(settings, options=options, in_memory=True) as engine:
            certificate = await run(
                engine, tokenizer, plan, compile=compiled_behind(settings.compile), codec=settings.store.codec,
                checks=checks, floor=floor,
                embed=embed, out=out, progress=lambda text: meter(text),
            )  # fmt: skip
    places = [in_data(settings.data_dir, info.layout)]
    if into_model:
        places.append(in_model(settings.model, info.layout.dtype))
    for place in places:
        write(certificate, place)
    return certificate, places


def _show(certificate: Certificate) -> None:
    from blend.certificate import ALL_TASKS

    columns = ["check", "holds", "error", "allowed", "of what"]
    checks = [
        [c.name, "yes" if c.passed else "NO", f"{c.error:.3g}", f"{c.limit:.3g}", c.detail] for c in certificate.checks
    ]
    print_table("Exactness", columns, checks, numbers=2)
    metric = certificate.calibration.metric
    columns = ["selector", "ratio", "task", "agreement", metric, "full prefill's", "KL first", "n"]
    whole = [t for t in certificate.ratios if t.task == ALL_TASKS]
    tasks = [t for t in certificate.ratios if t.task != ALL_TASKS and t.ratio == certificate.ratio]
    tables = {"Which layers to probe": certificate.profile, "How much to recompute": whole, "Task by task": tasks}
    for title, trials in tables.items():
        if trials:
            say()
            print_table(title, columns, [_row(t) for t in trials], numbers=3)
    say()
    if certificate.passed:
        say(f"passed: auto means {certificate.selector} at ratio {certificate.ratio:g}")
    for reason in certificate.reasons:
        say(f"not passed: {reason}")


def _row(t: Trial) -> list[str]:
    kl = "" if t.kl is None else f"{t.kl:.4f}"
    figures = [f"{t.agreement:.3f}", f"{t.score:.3f}", f"{t.full_score:.3f}", kl, str(t.n)]
    return [t.selector, f"{t.ratio:g}", t.task, *figures]
