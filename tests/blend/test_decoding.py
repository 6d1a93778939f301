"""From logits to text: sampling, stop strings, and never half a character."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from blend.engines.transformers.decoding import Answer, Detokenizer, sample
from blend.types import Delta, Sampling

EOS = 2
SIZE = 407


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Callable[[str], Path]) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_model("llama"))


def one_hot(token: int, size: int = SIZE) -> torch.Tensor:
    return torch.zeros(size).index_fill_(0, torch.tensor([token]), 50.0)


def write(tokenizer: Any, ids: list[int], **sampling: Any) -> list[Delta]:
    """Drive an answer with logits that force ``ids``."""
    answer = Answer(Sampling(**{"max_tokens": 10_000, **sampling}), tokenizer, frozenset({EOS}), seed=0)
    deltas = []
    for token in ids:
        deltas.append(answer.push(one_hot(token)))
        if answer.finished:
            break
    return deltas


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# -- text -------------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=25))
def test_pieces_add_up_to_the_text_and_none_is_half_a_character(tokenizer: Any, text: str) -> None:
    pieces = [d.text for d in write(tokenizer, [*ids_of(tokenizer, text), EOS])]
    assert "".join(pieces) == text
    assert all("\ufffd" not in p for p in pieces)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 406).filter(lambda t: t != EOS), max_size=30))
def test_any_tokens_decode_to_what_the_tokenizer_says(tokenizer: Any, ids: list[int]) -> None:
    pieces = [d.text for d in write(tokenizer, [*ids, EOS])]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert whole.startswith("".join(pieces))
    assert set(whole[len("".join(pieces)) :]) <= {"\ufffd"}  # only a broken last character is dropped


def test_a_character_of_four_bytes_comes_in_one_piece(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(t) for t in ids_of(tokenizer, "a😀b")]
    assert "".join(pieces) == "a😀b"
    assert pieces.count("") == len(pieces) - 3


def test_half_a_character_at_the_end_is_dropped(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "ok 😀")[:-1]
    assert "".join(d.text for d in write(tokenizer, ids, max_tokens=len(ids))) == "ok "


def test_special_tokens_are_not_text(tokenizer: Any) -> None:
    ids = [*ids_of(tokenizer, "one"), 4, *ids_of(tokenizer, "two"), EOS]
    assert "".join(d.text for d in write(tokenizer, ids)) == "onetwo"


# -- the end ----------------------------------------------------------------------------------------------------------


def test_the_end_token_ends_the_answer_and_is_not_text(tokenizer: Any) -> None:
    deltas = write(tokenizer, [*ids_of(tokenizer, "done"), EOS, 50, 51])
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].token_ids == (EOS,)
    assert "".join(d.text for d in deltas) == "done"


def test_the_end_token_can_be_ignored(tokenizer: Any) -> None:
    ids = [*ids_of(tokenizer, "on"), EOS, *ids_of(tokenizer, "ly")]
    deltas = write(tokenizer, ids, ignore_eos=True, max_tokens=len(ids))
    assert ("".join(d.text for d in deltas), deltas[-1].finish_reason) == ("only", "length")


def test_length_ends_the_answer(tokenizer: Any) -> None:
    deltas = write(tokenizer, ids_of(tokenizer, "a b c d e f"), max_tokens=3)
    assert (len(deltas), deltas[-1].finish_reason) == (3, "length")


@settings(max_examples=200)
@given(st.text("ab.", max_size=20), st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_is_never_shown_nor_anything_behind_it(tokenizer: Any, text: str, stops: list[str]) -> None:
    ids = [t for c in text for t in ids_of(tokenizer, c)]  # one token a character
    deltas = write(tokenizer, [*ids, EOS], stop=tuple(stops))
    ends = [text.find(s) for s in stops if s in text]
    # The answer ends as soon as one is complete; the first to be complete wins, then the one that begins first.
    done = min((text.find(s) + len(s) for s in stops if s in text), default=None)
    cut = len(text) if done is None else min(text[:done].find(s) for s in stops if s in text[:done])
    assert "".join(d.text for d in deltas) == text[:cut]
    assert deltas[-1].finish_reason == "stop"
    assert (deltas[-1].token_ids == (EOS,)) == (not ends)


def test_text_is_held_back_only_while_it_could_become_a_stop_string(tokenizer: Any) -> None:
    ids = [t for c in "abcabd" for t in ids_of(tokenizer, c)]
    texts = [d.text for d in write(tokenizer, [*ids, EOS], stop=("abd",))]
    assert texts == ["", "", "abc", "", "", ""]


def test_what_was_held_back_comes_at_the_end(tokenizer: Any) -> None:
    ids = [t for c in "xab" for t in ids_of(tokenizer, c)]
    deltas = write(tokenizer, ids, stop=("abc",), max_tokens=3)
    assert [d.text for d in deltas] == ["x", "", "ab"]
    assert deltas[-1].finish_reason == "length"


# -- sampling ---------------------------------------------------------------------------------------------------------


def draw(logits: list[float], count: int = 400, seed: int = 0, **sampling: Any) -> Counter[int]:
    generator = torch.Generator().manual_seed(seed)
    chosen = Sampling(**{"temperature": 1.0, **sampling})
    return Counter(sample(torch.tensor(logits), chosen, Counter(), generator) for _ in range(count))


def test_greedy_takes_the_best() -> None:
    assert draw([0.0, 2.0, 1.0], temperature=0.0) == {1: 400}


def test_temperature_one_follows_the_probabilities() -> None:
    counts = draw([0.6931, 0.0], 4000)
    assert counts[0] / 4000 == pytest.approx(2 / 3, abs=0.03)


def test_a_high_temperature_flattens_and_a_low_one_sharpens() -> None:
    assert draw([2.0, 0.0], 2000, temperature=100.0)[1] > 900
    assert draw([2.0, 0.0], 2000, temperature=0.1)[1] == 0


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = [float(torch.tensor(p).log()) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(draw(logits, top_p=0.4)) == {0}
    assert set(draw(logits, top_p=0.7)) == {0, 1}
    assert set(draw(logits, top_p=0.9)) == {0, 1, 2}
    assert set(draw(logits, 2000, top_p=1.0)) == {0, 1, 2, 3}
    assert set(draw(logits, top_p=0.0001)) == {0}


def test_a_seed_repeats_and_another_differs() -> None:
    flat = [0.0] * 50
    assert draw(flat, seed=1) == draw(flat, seed=1)
    assert draw(flat, seed=1) != draw(flat, seed=2)


def test_penalties_lower_what_was_said() -> None:
    logits, generator = torch.tensor([3.0, 2.5, 0.0]), torch.Generator()
    said = Counter({0: 2})

    def best(**penalties: float) -> int:
        return sample(logits, Sampling(**penalties), said, generator)

    assert best() == 0
    assert best(frequency_penalty=0.2) == 0
    assert best(frequency_penalty=0.3) == 1  # twice 0.3 is more than the lead of 0.5
    assert best(presence_penalty=0.4) == 0
    assert best(presence_penalty=0.6) == 1
    assert sample(logits, Sampling(frequency_penalty=-1.0), Counter({2: 4}), generator) == 2


def test_logits_are_not_changed_by_sampling() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    sample(logits, Sampling(temperature=0.7, top_p=0.5, presence_penalty=1.0), Counter({2: 1}), torch.Generator())
    assert logits.tolist() == [1.0, 2.0, 3.0]


def test_logprobs_are_those_of_the_raw_logits(tokenizer: Any) -> None:
    logits = torch.randn(SIZE, generator=torch.Generator().manual_seed(3))
    sampling = Sampling(max_tokens=5, temperature=0.3, presence_penalty=2.0, logprobs=4, ignore_eos=True)
    answer = Answer(sampling, tokenizer, frozenset(), seed=0)
    expected = logits.log_softmax(-1)
    for _ in range(5):
        (entry,) = answer.push(logits).logprobs
        assert entry.logprob == pytest.approx(float(expected[entry.token_id]))
        assert [t for t, _, _ in entry.top] == logits.topk(4).indices.tolist()
        assert [p for _, _, p in entry.top] == pytest.approx(expected.topk(4).values.tolist())
        assert entry.text == tokenizer.decode([entry.token_id])


def test_no_logprobs_unless_asked_and_none_may_be_asked_for(tokenizer: Any) -> None:
    assert write(tokenizer, [50])[0].logprobs == ()
    (entry,) = write(tokenizer, [50], logprobs=0)[0].logprobs
    assert (entry.token_id, entry.top) == (50, ())
