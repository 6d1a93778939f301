"""Scores agree with the definitions and with the libraries they are named after."""

from __future__ import annotations

import math
import random

import pytest

from app.evaluate.measures import diverges_at, is_right, kl_lower_bound, mean_and_interval
from app.evaluate.stem import stem
from app.evaluate.texts import METRICS, normalise, rouge_l, score

# By NLTK 3.10's PorterStemmer; several differ from Porter's paper, and some steps undo others.
STEMS = {
    "caresses": "caress", "ponies": "poni", "ties": "tie", "flies": "fli", "dies": "die", "cats": "cat",
    "feed": "feed", "agreed": "agre", "plastered": "plaster", "bled": "bled", "motoring": "motor", "sing": "sing",
    "conflated": "conflat", "troubled": "troubl", "sized": "size", "hopping": "hop", "falling": "fall",
    "hissing": "hiss", "filing": "file", "died": "die", "spied": "spi", "happy": "happi", "enjoy": "enjoy",
    "sky": "sky", "skies": "sky", "relational": "relat", "conditional": "condit", "rational": "ration",
    "digitizer": "digit", "radically": "radic", "differently": "differ", "vietnamization": "vietnam",
    "operator": "oper", "callousness": "callous", "sensitivity": "sensit", "archaeology": "archaeolog",
    "geology": "geolog", "hopefully": "hope", "triplicate": "triplic", "electrical": "electr", "goodness": "good",
    "allowance": "allow", "replacement": "replac", "adoption": "adopt", "homologous": "homolog", "rate": "rate",
    "cease": "ceas", "controlling": "control", "rolled": "roll", "succeed": "succeed", "innings": "inning",
    "yellow": "yellow", "yyyy": "yyyi", "news": "news", "as": "as", "dying": "die", "1871": "1871",
}  # fmt: skip


def ids(text: str) -> list[int]:
    """A tokenizer that cuts texts into pairs of letters."""
    return [hash(text[i : i + 2]) for i in range(0, len(text), 2)]


@pytest.mark.parametrize("word", STEMS)
def test_stems_are_those_of_the_usual_stemmer(word: str) -> None:
    assert stem(word) == STEMS[word]


@pytest.mark.parametrize(
    ("answer", "gold", "value"),  # by rouge_score 0.1.2, use_stemmer=True
    [
        ("Mara hurries home, the dog ran happy!", "Mara's dogs were running happily; she hurried home.", 0.375),
        ("the mat was sat on by cats", "the cat sat on the mat", 0.4615384615384615),
        ("The relations operated.", "the relational operators", 1.0),
        ("nothing", "in common", 0.0),
        ("", "in common", 0.0),
        ("Überall — ...", "berall", 1.0),
    ],
)
def test_rouge_l_is_that_of_the_usual_library(answer: str, gold: str, value: float) -> None:
    assert rouge_l(answer, gold) == pytest.approx(value, abs=1e-12)


def test_a_perfect_answer_scores_one_everywhere_and_silence_scores_nothing() -> None:
    assert score("Ida Voss", ["Ida Voss"], ids) == dict.fromkeys(METRICS, 1.0)
    assert score("", ["Ida Voss"], ids) == dict.fromkeys(METRICS, 0.0)


def test_f1_counts_words_once_and_takes_the_best_gold_answer() -> None:
    said = score("It was The Ida, Ida Voss!", ["Pawel Brint", "Ida Voss"], ids)
    # "it was ida ida voss" against "ida voss": 2 of 5 words right, 2 of 2 found.
    assert said["f1"] == pytest.approx(2 * 0.4 * 1 / 1.4)
    assert said["subspan_em"] == said["accuracy"] == 1.0
    assert said["recall"] == 0.5


def test_cacheblends_f1_reads_one_line_of_ids_and_maps_yes_and_no() -> None:
    assert score("Yes, it is deeper.", ["yes"], ids)["f1_ids"] == 1.0
    assert score("Not at all", ["no"], ids)["f1_ids"] == 1.0  # as CacheBlend's parse_generation does
    assert score("\nabcd\nefgh", ["abcd efgh"], ids)["f1_ids"] < 1.0
    # "abcd" is [ab, cd], "abxx" is [ab, xx]: one of two pairs.
    assert score("abcd", ["abxx"], ids)["f1_ids"] == pytest.approx(0.5)
    assert score("the", ["a"], ids)["f1_ids"] == 1.0  # both normalise to nothing: they agree
    assert score("the", ["a"], ids)["subspan_em"] == 0.0


def test_normal_form_drops_case_punctuation_and_articles() -> None:
    assert normalise("The  U.S.A., an  Answer\n(a)") == "usa answer"


@pytest.mark.parametrize(
    ("answer", "right"),
    [("The pear.", True), ("PEAR", True), (" pear\n", True), ("pearl", False), ("", False), ("a red pear tree", True)],
)
def test_an_answer_is_right_when_it_holds_the_words(answer: str, right: bool) -> None:
    assert is_right(answer, "pear") is right


@pytest.mark.parametrize(
    ("arm", "at"), [((1, 2, 3), None), ((1, 2, 4), 2), ((9, 2, 3), 0), ((1, 2), 2), ((1, 2, 3, 3), 3), ((), 0)]
)
def test_answers_diverge_at_their_first_other_token(arm: tuple[int, ...], at: int | None) -> None:
    assert diverges_at((1, 2, 3), arm) == at


def test_the_interval_holds_the_mean_and_shrinks_with_n() -> None:
    few, many = mean_and_interval([1.0, 0.0] * 5), mean_and_interval([1.0, 0.0] * 500)
    assert few[0] == many[0] == 0.5
    assert few[1][0] < many[1][0] < 0.5 < many[1][1] < few[1][1]
    assert mean_and_interval([1.0] * 9)[1] == (1.0, 1.0)


def test_kl_is_exact_when_the_lists_hold_everything() -> None:
    p, q = {1: math.log(0.75), 2: math.log(0.25)}, {1: math.log(0.5), 2: math.log(0.5)}
    assert kl_lower_bound(p, q) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kl_lower_bound(p, p) == 0.0


def test_kl_of_truncated_lists_never_exceeds_the_truth() -> None:
    rng = random.Random(0)
    for _ in range(200):
        p, q = ([rng.expovariate(1) ** 3 + 1e-9 for _ in range(60)] for _ in range(2))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        truth = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        tops = [{i: math.log(d[i]) for i in sorted(range(60), key=lambda i: -d[i])[:20]} for d in (p, q)]
        assert -1e-12 <= kl_lower_bound(*tops) <= truth + 1e-9
