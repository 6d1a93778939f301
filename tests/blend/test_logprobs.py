"""Log-probabilities mean the same on every engine: of the raw logits, the most likely tokens, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from blend.types import TokenLogprob
from tests.blend.served import Served
from tests.blend.tiny import Truth, sentence


async def logprobs(served: Served, request: Any) -> list[TokenLogprob]:
    return [t async for delta in served.engine.generate(request) for t in delta.logprobs]


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_they_are_of_the_raw_logits_and_the_most_likely_ones_in_order(
    engine: Served, truth: Callable[[str], Truth], temperature: float, count: int
) -> None:
    prompt = engine.prompt(engine.document(*(sentence(i, 20) for i in range(3))))
    request = engine.request(prompt, tokens=5, temperature=temperature, top_p=0.9, seed=3, logprobs=count)
    got = engine.loop.run(logprobs(engine, replace(request, priority=20)))
    assert engine.engine.info.max_logprobs >= 20
    ids = [*prompt.token_ids, *(t.token_id for t in got)]
    right = truth("llama").logprobs(ids)[len(prompt.token_ids) - 1 : -1]
    assert len(got) == 5
    for token, row in zip(got, right, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=engine.tolerance)
        assert len(token.top) == count
        values = [value for _, _, value in token.top]
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx(row.topk(count).values.tolist(), abs=engine.tolerance)
        assert values == pytest.approx([float(row[i]) for i, _, _ in token.top], abs=engine.tolerance)
