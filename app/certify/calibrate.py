"""Calibrate: which layers to probe, and how much to recompute, for answers like full prefill's.

The questions of the profile are not those that measure the selector it chooses: a choice looks good on what it was
chosen by.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from app.evaluate.plan import FULL, REUSE, Plan, make_arms
from blend.certificate import ALL_TASKS, Trial
from blend.select import AUTO, NAMES
from blend.select.spec import parse

PROFILE_RATIO = 0.1
RATIOS = (0.0, 0.05, 0.1, 0.15, 0.25)
MOST_LOST = 0.01  # of full prefill's score
_PROFILE_SHARE = 4  # a quarter of the questions choose the layers
_GAIN = 2  # questions that a choice of layers must win over all of them to be taken

Ask = Callable[..., Awaitable[dict[str, Any]]]
"""``run_quality`` on one engine: takes ``plan``, gives its report."""


def candidates(layers: int) -> tuple[str, ...]:
    """Selectors to compare: the default one, then the same asking other bands of the model's ``layers`` layers."""
    edges = [layers * i // 4 for i in range(5)]
    quarters = [f"{a}-{b - 1}" if b - a > 1 else str(a) for a, b in pairwise(edges) if b > a]
    return tuple(dict.fromkeys([AUTO, *(asking(AUTO, band) for band in ("all", "upper", *quarters))]))


def asking(spec: str, band: str) -> str:
    """``spec`` with its ``question`` part probing the layers of ``band``."""
    parts = []
    for part in parse(spec, NAMES, frozenset()):
        options = tuple((key, value) for key, value in part.options if key != "layers")
        if part.name == "question" and band != "all":
            options = (("layers", band), *options)
        parts.append(str(replace(part, options=options) if part.name == "question" else part))
    return "+".join(parts)


def split(questions: int) -> tuple[int, int]:
    """Questions of each task for the profile, and for the ratios after it."""
    first = max(1, questions // _PROFILE_SHARE)
    return first, questions - first


async def profile(ask: Ask, plan: Plan, layers: int) -> tuple[str, tuple[Trial, ...]]:
    """The selector whose probe serves a model of ``layers`` layers best, and all that were compared, at
    ``PROFILE_RATIO``."""
    specs = candidates(layers)
    first, _ = split(len(plan.indices))
    arms = make_arms(specs, [PROFILE_RATIO])
    report = await ask(plan=replace(plan, arms=arms, questions=first))
    trials = tuple(pooled(report, spec, PROFILE_RATIO, spec) for spec in specs)
    best = max(trials, key=lambda t: (t.agreement, -(t.kl or 0.0)))
    default = trials[0]
    chosen = best if (best.agreement - default.agreement) * default.n >= _GAIN - 0.5 else default
    return chosen.selector, trials


async def measure(ask: Ask, plan: Plan, selector: str) -> tuple[Trial, ...]:
    """``selector`` at every ratio: over all questions first, then task by task."""
    first, rest = split(len(plan.indices))
    arms = make_arms([selector], [r for r in RATIOS if r > 0])
    report = await ask(plan=replace(plan, arms=arms, first=plan.first + first, questions=rest))
    names = {r: f"{selector}@{r:g}" if r > 0 else REUSE for r in RATIOS}
    whole = [pooled(report, selector, r, name) for r, name in names.items()]
    tasks = [pooled(report, selector, r, name, (task,)) for task in report["tasks"] for r, name in names.items()]
    return (*whole, *tasks)


def pooled(report: dict[str, Any], selector: str, ratio: float, arm: str, tasks: Sequence[str] = ()) -> Trial:
    """One arm of ``report`` over all ``tasks`` (default: every one), each question counting the same."""
    found = [report["tasks"][t] for t in tasks or report["tasks"]]
    ours, fulls, metric = [f[arm] for f in found], [f[FULL] for f in found], report["metric"]
    weights = [a["n"] for a in ours]

    def mean(values: Sequence[float]) -> float:
        total: float = sum(v * w for v, w in zip(values, weights, strict=True))
        return float(round(total / sum(weights), 6))

    known = all(a["kl_first"] is not None for a in ours)
    return Trial(
        task=tasks[0] if tasks else ALL_TASKS,
        selector=selector,
        ratio=ratio,
        n=sum(weights),
        agreement=mean([a["agreement"] for a in ours]),
        score=mean([a[metric] for a in ours]),
        full_score=mean([a[metric] for a in fulls]),
        kl=mean([a["kl_first"] for a in ours]) if known else None,
    )


def least_ratio(trials: Sequence[Trial], floor: float) -> float | None:
    """The smallest ratio that agrees often enough and loses no score, as do all larger ones; ``None`` if none does.

    A ratio that does well below one that does not was lucky. Never 0: these questions have whole documents behind them,
    and a request may bring passages whose KV has read nothing.
    """
    found: float | None = None
    for t in sorted((t for t in trials if t.task == ALL_TASKS and t.ratio > 0), key=lambda t: -t.ratio):
        if t.agreement < floor or _lost(t) > MOST_LOST:
            break
        found = t.ratio
    return found


def shortfalls(trials: Sequence[Trial], floor: float) -> list[str]:
    """Why no ratio will do: what the largest one lacks."""
    top = max((t for t in trials if t.task == ALL_TASKS), key=lambda t: t.ratio)
    found = []
    if top.agreement < floor:
        found.append(f"agreement with full prefill is {top.agreement:.3f} at ratio {top.ratio:g}, below {floor:g}")
    if _lost(top) > MOST_LOST:
        lost = f"{_lost(top):.3f} below full prefill's, allowed {MOST_LOST:g}"
        found.append(f"the score at ratio {top.ratio:g} is {lost}")
    return found


def _lost(trial: Trial) -> float:
    return round(trial.full_score - trial.score, 6)
