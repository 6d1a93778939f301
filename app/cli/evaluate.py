"""``ragblend eval quality``: what reuse costs in answers, and what recomputing a few rows gives back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from app.cli.options import Config, EngineName, Json, ManyCommand, Model, help_alone, read_settings
from app.cli.output import Meter, note, print_json, print_table, quiet_engines, stdout_is_for_results

if TYPE_CHECKING:
    from app.evaluate.asker import Embed
    from app.evaluate.quality import Plan
    from app.settings import Settings

group = typer.Typer(help="Evaluate.", rich_markup_mode=None)

Markdown = Annotated[Path | None, typer.Option("--markdown", help="Write the table to this file, as Markdown.")]


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
    first: Annotated[int, typer.Option("--first", help="Number of the first question; runs may share the work.")] = 0,
    task: Annotated[list[str] | None, typer.Option("--task", help="Generated tasks.  [default: all]")] = None,
    documents: Annotated[int, typer.Option("--documents", help="Documents of a generated context.")] = 8,
    chunks: Annotated[int, typer.Option("--chunks", help="Chunks of a generated document, 1 to 3.")] = 2,
    chunk_tokens: Annotated[
        str | None,
        typer.Option("--chunk-tokens", help="Least and most tokens of a generated chunk.  [default: 64,255]"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Ask this file instead (JSON or JSON lines, CacheBlend or LongBench).")
    ] = None,
    style: Annotated[
        str,
        typer.Option(
            "--style", help="Prompt and metric for --data: musique, 2wiki, hotpotqa, summarize, ruler, service."
        ),
    ] = "musique",
    max_chunks: Annotated[
        int | None, typer.Option("--max-chunks", help="Keep only the first passages of each question of --data.")
    ] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", help="chat: the tokenizer's template; plain: as written, for base models.")
    ] = "chat",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Longest answer.  [default: the style's]")
    ] = None,
    selector: Annotated[
        list[str] | None,
        typer.Option("--selector", help="Selectors (specs) to compare.  [default: deviation heads question auto]"),
    ] = None,
    ratio: Annotated[list[float] | None, typer.Option("--ratio", help="Recompute ratios.  [default: 0.1]")] = None,
    compile: Annotated[
        list[str] | None,
        typer.Option(
            "--compile",
            help="What chunks are compiled behind: prefix, document, neighbours, "
            "random-neighbours, repeated-self.  [default: prefix]",
        ),
    ] = None,
    neighbours: Annotated[int, typer.Option("--neighbours", help="Chunks in front, where --compile has them.")] = 3,
    out: Annotated[
        Path | None, typer.Option("--out", help="Append results here (JSON lines); a second run goes on.")
    ] = None,
    markdown: Markdown = None,
    model: Model = None,
    engine: EngineName = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Full prefill, reuse and selectors on the same questions and engine, one question at a time.

    The table: the score and its bootstrap 95 % interval; to full: the paired difference to full prefill; retained: what
    is left of full prefill's score where it has one; agreement: share of answers equal to full prefill's, token by
    token; differs at: median position of the first other token; KL first: KL(full || arm) of the first token in nats, a
    lower bound from the 20 most probable tokens of both; recomputed: share of the context's rows; row-layers: share of
    rows x layers that were run through the model.
    """
    from app.demo.world import EXAMPLE_CHUNK_TOKENS, TASKS
    from app.evaluate.dataset import read_dataset
    from app.evaluate.plan import Compile
    from app.evaluate.quality import EvaluationError, Plan, make_arms
    from app.evaluate.styles import find_style

    if data is None and max_chunks is not None:
        raise EvaluationError("--max-chunks is for --data; choose --documents and --chunks for generated questions")
    if data is not None and task:
        raise EvaluationError(f"--task {task[0]} is for generated questions; the file of --data is one task")
    settings = read_settings(config, model=model, engine=engine)
    plan = Plan(
        make_arms(selector or ["deviation", "heads", "question", "auto"], ratio or [0.1]),
        seed=seed,
        questions=questions,
        documents=documents,
        compile=cast("tuple[Compile, ...]", tuple(compile or ["prefix"])),  # the plan checks them
        tasks=tuple(dict.fromkeys(task)) if task else TASKS,
        max_tokens=max_tokens,
        chunks=chunks,
        chunk_tokens=_two_numbers(chunk_tokens) if chunk_tokens else EXAMPLE_CHUNK_TOKENS,
        first=first,
        neighbours=neighbours,
        data=read_dataset(data, find_style(style), max_chunks=max_chunks) if data else None,
        prompt=prompt,
    )
    quiet_engines(settings.model)
    with stdout_is_for_results():
        report = asyncio.run(_evaluate_plan(settings, plan, out))
    _show(report, markdown, as_json)


@group.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="Results written by eval quality --out.")],
    markdown: Markdown = None,
    as_json: Json = False,
) -> None:
    """One table from the results of several runs: of the same engine, model and kind of questions, other ranges."""
    from app.evaluate.quality import merge_report

    _show(merge_report(files), markdown, as_json)


def _show(report: dict[str, Any], markdown: Path | None, as_json: bool) -> None:
    from app.evaluate import summary

    if markdown:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(summary.markdown(report), encoding="utf-8")
    if as_json:
        print_json(report)
    else:
        print_table(summary.title(report), summary.COLUMNS, summary.rows(report), numbers=2)


def _two_numbers(text: str) -> tuple[int, int]:
    from app.evaluate.quality import EvaluationError

    parts = text.split(",")
    if len(parts) != 2 or not all(p.strip().isdigit() for p in parts):
        raise EvaluationError(f"--chunk-tokens {text} must be two numbers, as in 64,255")
    return int(parts[0]), int(parts[1])


async def _evaluate_plan(settings: Settings, plan: Plan, out: Path | None) -> dict[str, Any]:
    from app.bench.machine import describe_machine
    from app.bench.workbench import load_tokenizer, throwaway_engine
    from app.evaluate.quality import run_quality

    tokenizer = load_tokenizer(settings.model)
    embed: Embed | None = None
    if "neighbours" in plan.compiles:
        from retriever.embed import open_embedder

        embed = open_embedder(settings.embedder).embed
    if out:
        note(f"eval: results go to {out}; run the same command again to go on after an interruption")
    async with throwaway_engine(settings, in_memory=True) as opened:
        with Meter("eval", len(plan.indices) * len(plan.source.tasks)) as meter:
            report = await run_quality(opened, tokenizer, plan, embed=embed, out=out, progress=lambda text: meter(text))
    return report | {"machine": describe_machine()}
