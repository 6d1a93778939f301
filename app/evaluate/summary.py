"""Summarise: records of answers to one report, machine-readable and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from app.evaluate.measures import mean_and_interval
from app.evaluate.plan import FULL
from app.evaluate.texts import METRICS

Record = dict[str, Any]

COLUMNS = (
    "task", "arm", "score", "95 % CI", "to full", "95 % CI", "retained", "agreement", "differs at", "KL first",
    "recomputed", "row-layers", "n",
)  # fmt: skip


def summarise(records: Iterable[Record], names: Mapping[str, str], metric: str) -> dict[str, Any]:
    """``{task: {name: {...}}}``. ``names``: the trials (by key) to report, and what to call them.

    Of each arm, over the ``n`` questions it answered: the mean of every metric; ``ci95``, the bootstrap 95 % interval
    of ``metric``; ``difference`` to full prefill on the same questions with its interval; ``retention``: what is left
    of full prefill's score on the questions that full prefill scores on; ``agreement``: share of answers equal to full
    prefill's, token by token; ``diverges_at``: median position of the first other token among those that are not;
    ``kl_first``: mean KL(full || arm) of the first token in nats, a lower bound; ``recomputed`` and ``reused``: shares
    of the context's rows; ``computed_share``: of the context's rows x layers, what was run through the model.
    """
    tasks: dict[str, list[Record]] = {}
    for record in records:
        tasks.setdefault(record["task"], []).append(record)
    report: dict[str, Any] = {}
    for task, asked in tasks.items():
        report[task] = {}
        for key, name in names.items():
            pairs = [(r["trials"][key], r["trials"][FULL]) for r in asked if key in r["trials"] and FULL in r["trials"]]
            if pairs:
                report[task][name] = _arm(pairs, metric)
    return report


def _arm(pairs: Sequence[tuple[Record, Record]], metric: str) -> dict[str, Any]:
    scores = [arm["scores"][metric] for arm, _ in pairs]
    wanted = [full["scores"][metric] for _, full in pairs]
    _, interval = mean_and_interval(scores)
    difference, of_difference = mean_and_interval([a - f for a, f in zip(scores, wanted, strict=True)])
    answered = [(a, f) for a, f in zip(scores, wanted, strict=True) if f > 0]
    retained = sum(a for a, _ in answered) / sum(f for _, f in answered) if answered else None
    diverged = [arm["diverges"] for arm, _ in pairs if arm["diverges"] is not None]
    return {
        "accuracy": round(statistics.fmean(arm["scores"]["accuracy"] for arm, _ in pairs), 4),
        "n": len(pairs),
        "ci95": [round(x, 4) for x in interval],
        "agreement": round(1 - len(diverged) / len(pairs), 4),
        "kl_first": _mean([arm["kl_first"] for arm, _ in pairs], digits=6),
        "difference": round(difference, 4),
        "difference_ci95": [round(x, 4) for x in of_difference],
        "retention": None if retained is None else round(retained, 4),
        "diverges_at": statistics.median(diverged) if diverged else None,
        **{name: _mean([arm["scores"][name] for arm, _ in pairs]) for name in METRICS if name != "accuracy"},
        **{name: _mean([arm.get(name) for arm, _ in pairs]) for name in ("recomputed", "reused", "computed_share")},
    }


def name_trials(keys: Iterable[str]) -> dict[str, str]:
    """Short names of trials by key, as a plan names them: what all have in common is left out."""
    behind: dict[str, tuple[str, str]] = {}
    for key in dict.fromkeys(keys):
        compile, _, arm = key.rpartition(" ")
        behind[key] = (compile, arm)
    contexts = {compile for compile, _ in behind.values() if compile}
    ratios = {arm.rpartition("@")[2] for _, arm in behind.values() if "@" in arm}
    named = {}
    for key, (compile, arm) in behind.items():
        selector, at, ratio = arm.rpartition("@")
        name = arm if not at else selector if len(ratios) == 1 else f"{selector}@{float(ratio):g}"
        named[key] = f"{name}/{compile}" if compile and len(contexts) > 1 else name
    return named


def ratios_of(keys: Iterable[str]) -> list[float]:
    return sorted({float(key.rpartition("@")[2]) for key in keys if "@" in key})


def rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the table of ``report``, under ``COLUMNS``."""
    metric = report["metric"]
    table = []
    for task, arms in report["tasks"].items():
        for name, a in arms.items():
            full = name == FULL
            table.append(
                [
                    task,
                    name,
                    f"{a[metric]:.3f}",
                    "{:.3f} .. {:.3f}".format(*a["ci95"]),
                    "" if full else f"{a['difference']:+.3f}",
                    "" if full else "{:+.3f} .. {:+.3f}".format(*a["difference_ci95"]),
                    _cell(None if full else a["retention"], ".3f"),
                    f"{a['agreement']:.3f}",
                    _cell(a["diverges_at"], "g"),
                    _cell(a["kl_first"], ".4f"),
                    _cell(a["recomputed"], ".3f"),
                    _cell(a["computed_share"], ".3f"),
                    str(a["n"]),
                ]
            )
    return table


def title(report: Mapping[str, Any]) -> str:
    if "data" in report:
        asked = f"{report['data']}, style {report['style']}"
    else:
        low, high = report["chunk_tokens"]
        asked = f"{report['documents']} documents of {report['chunks']} chunks of {low} to {high} tokens"
    ratios = ", ".join(f"{r:g}" for r in report["ratio"])
    return (
        f"{report['metric']}; {asked}; compile {', '.join(report['compile'])}; ratio {ratios or 'none'}; "
        f"{report['model']} on {report['engine']}"
    )


def markdown(report: Mapping[str, Any]) -> str:
    """The title and the table as Markdown."""
    lines = [
        f"**{title(report)}**",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---" + "|---:" * (len(COLUMNS) - 2) + "|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows(report)), ""])


def _mean(values: Sequence[float | None], *, digits: int = 4) -> float | None:
    given = [v for v in values if v is not None]
    return round(statistics.fmean(given), digits) if given else None


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
