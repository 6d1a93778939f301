"""``ragblend eval quality``: what reuse costs in answers, and what recomputing a few rows gives back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.options import Config, EngineName, Json, ManyCommand, Model, help_alone, read_settings
from app.cli.output import Meter, note, print_json, print_table, quiet_engines, stdout_is_for_results

if TYPE_CHECKING:
    from app.evaluate.quality import Plan
    from app.settings import Settings

group = typer.Typer(help="Evaluate.", rich_markup_mode=None)


def add_to(app: typer.Typer) -> None:
    app.add_typer(group, name="eval")


@group.callback(invoke_without_command=True)
def _evaluate(context: typer.Context) -> None:
    """Evaluate."""
    help_alone(context)


@group.command(cls=ManyCommand)
def quality(
    seed: Annotated[int, typer.Option("--seed", help="Which held-out questions.")] = 0,
    questions: Annotated[int, typer.Option("--questions", help="Questions of each task.")] = 100,
    selector: Annotated[
        list[str] | None,
        typer.Option("--selector", help="Selectors to compare.  [default: deviation heads question auto]"),
    ] = None,
    ratio: Annotated[list[float] | None, typer.Option("--ratio", help="Recompute ratios.  [default: 0.15]")] = None,
    documents: Annotated[int, typer.Option("--documents", help="Documents (two chunks each) of a context.")] = 3,
    compile: Annotated[
        str, typer.Option("--compile", help="What chunks are compiled behind: prefix or document.")
    ] = "prefix",
    out: Annotated[
        Path | None, typer.Option("--out", help="Append results here (JSON lines); a second run goes on.")
    ] = None,
    model: Model = None,
    engine: EngineName = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Accuracy of full prefill, reuse and selectors on the same held-out generated questions.

    agreement: share of answers equal to full prefill's, token by token. kl_first: KL(full || arm) of the first token in
    nats, a lower bound from the 20 most probable tokens of both.
    """
    from app.evaluate.log import EvaluationError
    from app.evaluate.quality import Plan, make_arms

    if compile not in ("prefix", "document"):
        raise EvaluationError(f"--compile {compile} is unknown; choose prefix or document")
    settings = read_settings(config, model=model, engine=engine)
    arms = make_arms(selector or ["deviation", "heads", "question", "auto"], ratio or [0.15])
    plan = Plan(arms, seed, questions, documents, "prefix" if compile == "prefix" else "document")
    quiet_engines(settings.model)
    with stdout_is_for_results():
        report = asyncio.run(_evaluate_plan(settings, plan, out))
    if as_json:
        print_json(report)
        return
    columns = ["task", "arm", "accuracy", "95 % CI", "agreement", "KL first", "n"]
    rows = [
        [task, name, f"{a['accuracy']:.3f}", "{:.3f} .. {:.3f}".format(*a["ci95"]), f"{a['agreement']:.3f}",
         "" if a["kl_first"] is None else f"{a['kl_first']:.4f}", a["n"]]
        for task, of_task in report["tasks"].items() for name, a in of_task.items()
    ]  # fmt: skip
    title = f"{plan.documents} documents, {plan.compile} compile, ratio {report['ratio']}, {report['engine']}"
    print_table(title, columns, rows, numbers=2)


async def _evaluate_plan(settings: Settings, plan: Plan, out: Path | None) -> dict[str, Any]:
    from app.bench.machine import describe_machine
    from app.bench.workbench import load_tokenizer, throwaway_engine
    from app.evaluate.quality import run_quality

    tokenizer = load_tokenizer(settings.model)
    if out:
        note(f"eval: results go to {out}; run the same command again to go on after an interruption")
    async with throwaway_engine(settings) as opened:
        with Meter("eval", plan.questions * len(plan.tasks)) as meter:
            report = await run_quality(opened, tokenizer, plan, out=out, progress=lambda text: meter(text))
    return report | {"machine": describe_machine()}
