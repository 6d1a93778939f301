"""Scores of an answer's text against the gold answers, each by the definition its papers use; 0 to 1, best gold counts.

accuracy    a gold answer stands in the answer as whole words (generated tasks have one gold answer)
f1          LongBench: multisets of words of the normalised texts
f1_ids      CacheBlend: multisets of the tokenizer's ids of the normalised texts; first line only, yes and no mapped
rouge_l     ROUGE-L f-measure as ``rouge_scorer`` computes it, Porter stemmer on (NLTK's, see ``stem.py``)
subspan_em  best-subspan-EM: a normalised gold answer is part of the normalised answer
recall      RULER's string_match_all: the share of the gold answers that are part of the answer
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from app.evaluate.measures import is_right
from app.evaluate.stem import stem

METRICS = ("accuracy", "f1", "f1_ids", "rouge_l", "subspan_em", "recall")

TokenIds = Callable[[str], Sequence[int]]

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(answer: str, gold: Sequence[str], token_ids: TokenIds) -> dict[str, float]:
    """Every metric of ``METRICS``. ``token_ids`` is the served model's tokenizer, without control tokens."""
    line = _first_line(answer)
    return {
        "accuracy": float(any(is_right(answer, g) for g in gold)),
        "f1": max(_overlap(normalise(answer).split(), normalise(g).split()) for g in gold),
        "f1_ids": max(_overlap(token_ids(normalise(line)), token_ids(normalise(g)), empty=1.0) for g in gold),
        "rouge_l": max(rouge_l(answer, g) for g in gold),
        "subspan_em": float(any(n in normalise(answer) for g in gold if (n := normalise(g)))),
        "recall": sum(g.lower() in answer.lower() for g in gold) / len(gold),
    }


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    plain = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def rouge_l(answer: str, gold: str) -> float:
    """Longest common subsequence of stemmed words, as an f-measure."""
    a, g = _stems(answer), _stems(gold)
    if not a or not g:
        return 0.0
    best = [0] * (len(g) + 1)
    for x in a:
        diagonal = 0
        for i, y in enumerate(g, 1):
            diagonal, best[i] = best[i], diagonal + 1 if x == y else max(best[i], best[i - 1])
    common = best[-1]
    precision, recall = common / len(a), common / len(g)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def _overlap(answer: Sequence[Hashable], gold: Sequence[Hashable], *, empty: float = 0.0) -> float:
    """F1 of two multisets; ``empty`` is what two empty ones are worth."""
    if not answer or not gold:
        return empty * (not answer and not gold)
    common = (Counter(answer) & Counter(gold)).total()
    precision, recall = common / len(answer), common / len(gold)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def _first_line(answer: str) -> str:
    """CacheBlend's reading of a generation: its first line, or yes or no if it begins so."""
    line = answer.lstrip("\n").split("\n")[0]
    if line.startswith(("Yes", "yes")):
        return "Yes"
    return "No" if line.lstrip().startswith(("No", "no")) else line


def _stems(text: str) -> list[str]:
    return [stem(word) if len(word) > 3 else word for word in re.findall(r"[a-z0-9]+", text.lower())]
