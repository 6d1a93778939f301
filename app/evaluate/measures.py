"""What an arm is judged by: means with intervals, where it leaves full prefill's answer, its first token's KL."""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 4000


def is_right(answer: str, expected: str) -> bool:
    """Whether ``expected`` stands in ``answer`` as whole words, whatever the case and punctuation."""
    return f" {_words(expected)} " in f" {_words(answer)} "


def mean_and_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Mean and its bootstrap 95 % percentile interval (questions resampled with replacement)."""
    if not values:
        raise ValueError("there are no values to average")
    x = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(x), size=(RESAMPLES, len(x)))
    low, high = np.quantile(x[draws].mean(axis=1), [0.025, 0.975])
    return float(x.mean()), (float(low), float(high))


def diverges_at(full: Sequence[int], arm: Sequence[int]) -> int | None:
    """Position of the first token in which two answers differ (the end of the shorter one counts), None if equal."""
    if list(full) == list(arm):
        return None
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(full, arm, strict=False))
    return sum(1 for _ in same)


def kl_lower_bound(full: Mapping[int, float], arm: Mapping[int, float]) -> float:
    """A lower bound of KL(full || arm) in nats, from the top log-probabilities (token id -> logprob) of both.

    Engines return the top 20 only. Tokens in full's list stand for themselves and everything else is one further
    event, which can only lower a divergence. A token that arm's list lacks has at most the probability of arm's last
    one, and at most what arm's list leaves over; taking that maximum lowers it again. With nearly all mass in the lists
    the bound is nearly the value.
    """
    left = max(1.0 - sum(math.exp(v) for v in arm.values()), 0.0)
    most = min(math.exp(min(arm.values())), left) if arm else 1.0
    total, shared = 0.0, 0.0
    for token, logp in full.items():
        p = math.exp(logp)
        q = math.exp(arm[token]) if token in arm else max(most, 1e-12)
        shared += math.exp(arm[token]) if token in arm else 0.0
        total += p * (logp - math.log(q)) if p > 0 else 0.0
    rest = max(1.0 - sum(math.exp(v) for v in full.values()), 0.0)
    if rest > 1e-9:
        total += rest * (math.log(rest) - math.log(max(1.0 - shared, 1e-12)))
    return max(total, 0.0)


def _words(text: str) -> str:
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", plain))
