"""Full prefill, reuse and selectors answer the same held-out questions on the same engine, one question at a time.

For each question: passages -> keys -> compile behind each context -> one greedy answer per arm. Results go to a
JSON-lines file as they come, so an interrupted run goes on where it stopped, arms and questions can be added to a run
later, and runs over different ranges of questions can be merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from app.evaluate.asker import Asker, Embed
from app.evaluate.log import EvaluationError, ResultLog, merge
from app.evaluate.plan import COMPILES, FULL, REUSE, Arm, Compile, Plan, make_arms
from app.evaluate.summary import name_trials, ratios_of, summarise
from blend.engines import Engine
from blend.select import AUTO

__all__ = [
    "COMPILES",
    "FULL",
    "REUSE",
    "Arm",
    "Compile",
    "EvaluationError",
    "Plan",
    "make_arms",
    "merge_report",
    "run_quality",
]

FORMAT = 2

Progress = Callable[[str], None]


async def run_quality(
    engine: Engine,
    tokenizer: Any,
    plan: Plan,
    *,
    embed: Embed | None = None,
    out: Path | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Ask every question of ``plan`` and return ``{"tasks": {task: {arm: {...}}}, ...}`` (see ``summarise``).

    ``embed`` finds the neighbours of the compile context ``neighbours``. ``out``: results are appended there and those
    already in it are not asked again. ``progress`` is called once per question. Raises ``EvaluationError`` if ``out``
    belongs to another run.
    """
    asker = Asker(engine, tokenizer, plan, embed)
    source, trials = plan.source, plan.trials
    asked = [(task, index) for index in plan.indices for task in source.tasks]
    run = _run(engine, plan)
    with ResultLog.open(out, run) as log:
        for index in plan.indices:
            for task in source.tasks:
                known = log.find(task, index)
                todo = [t for t in trials if known is None or t.key not in known["trials"]]
                if todo:
                    record = await asker.ask(source.item(task, index), task, index, todo, known)
                    log.add(record)
                    known = known or record
                progress(f"{task}: full {known['trials'][FULL]['scores'][run['metric']]:.2f}" if known else task)
            asker.forget()
        records = [r for task, index in asked if (r := log.find(task, index)) is not None]
        return _report(run, records, {t.key: t.name for t in trials})


def merge_report(paths: Sequence[Path]) -> dict[str, Any]:
    """The report over the results in several files of one run. Raises ``EvaluationError``."""
    run, records = merge(paths)
    names = name_trials(key for record in records for key in record["trials"])
    return _report(run, records, names)


def _run(engine: Engine, plan: Plan) -> dict[str, Any]:
    """What must be equal for two results to be of one run: engine build, model, kind of question, prompt."""
    info, source = engine.info, plan.source
    return {
        "format": FORMAT,
        "engine": f"{info.name} {info.version}",
        "torch": torch.__version__,
        "device": info.device,
        "model": info.model,
        "weights": info.layout.digest.hex(),
        "auto": AUTO,
        "metric": source.style.metric,
        **plan.identity,
    }


def _report(run: dict[str, Any], records: Iterable[dict[str, Any]], names: dict[str, str]) -> dict[str, Any]:
    contexts = dict.fromkeys(key.rpartition(" ")[0] for key in names if key != FULL)
    return {
        "tasks": summarise(records, names, run["metric"]),
        **{name: value for name, value in run.items() if name != "format"},
        "ratio": ratios_of(names),
        "compile": list(contexts),
    }
