"""Citations: what supports the answer is cited, exactly; nothing else is."""

from __future__ import annotations

import time

import pytest

from app.citations import MarkerFilter, Passage, cite


def passage(name: str, text: str, title: str = "", score: float = 0.5, page: int | None = None) -> Passage:
    return Passage(name, f"doc-{name}", title or name, f"{name}.txt", text, score, page)


MARA = passage("mara", "She was a painter. She was born in Eastford. She kept two grey cats.", "Mara Venn", page=3)
OTTO = passage("otto", "He was a sailor. He was born in Westhaven. He moved to Eastford later.", "Otto Brandt", 0.9)


def test_a_one_word_answer_cites_the_sentence_it_stands_in() -> None:
    [found] = cite("Eastford", "Where was Mara Venn born?", [OTTO, MARA])
    assert (found.passage.chunk_id, found.quote) == ("mara", "She was born in Eastford.")
    assert (found.start, found.stop) == (0, 8)
    assert found.passage.url == "/v1/files/doc-mara/content#chunk=mara&page=3"


@pytest.mark.parametrize("answer", ["Eastford.", " eastford ", "“Eastford”", "EASTFORD!", "In Eastford."])
def test_punctuation_and_case_do_not_matter_and_the_span_is_the_word(answer: str) -> None:
    [found] = cite(answer, "Where was Mara Venn born?", [OTTO, MARA])
    assert answer[found.start : found.stop].casefold().removeprefix("in ") == "eastford"
    assert found.passage is MARA


def test_a_sentence_cites_its_longest_run_of_words() -> None:
    answer = "I think that she kept two grey cats, but who knows."
    [found] = cite(answer, "What pets did Mara Venn have?", [OTTO, MARA])
    assert answer[found.start : found.stop] == "she kept two grey cats"
    assert found.quote == "She kept two grey cats."


def test_each_sentence_of_an_answer_has_its_own_source() -> None:
    answer = "Mara was born in Eastford. Otto was born in Westhaven."
    found = cite(answer, "Where were they born?", [OTTO, MARA])
    assert [f.passage.chunk_id for f in found] == ["mara", "otto"]
    assert [answer[f.start : f.stop] for f in found] == ["was born in Eastford", "was born in Westhaven"]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "   ",
        "Northgate",
        "I do not know.",
        "Yes.",
        "born",
        "Mara Venn was born.",
        "It is a long story of hers.",
        "?!",
    ],
)
def test_what_no_passage_says_is_not_cited(answer: str) -> None:
    assert cite(answer, "Where was Mara Venn born?", [OTTO, MARA]) == []


def test_one_common_word_in_a_long_answer_is_chance() -> None:
    assert cite("Later generations admired the bridge.", "What about bridges?", [OTTO]) == []


def test_a_marker_cites_its_passage() -> None:
    answer = "She was a painter [2]."
    [found] = cite(answer, "What was she?", [OTTO, MARA])
    assert (found.passage, found.quote) == (MARA, "She was a painter.")
    assert answer[found.start : found.stop] == "[2]"


def test_a_marker_that_its_passage_does_not_bear_out_is_not_believed() -> None:
    answer = "Zebras live in Africa [2]."
    assert cite(answer, "Where?", [OTTO, MARA]) == []


def test_words_of_other_scripts_are_words() -> None:
    text = "Он родился в городе Тверь. 彼は東京で生まれた。"
    [found] = cite("Тверь", "Где он родился?", [passage("ru", text)])
    assert found.quote == "Он родился в городе Тверь."


def test_many_words_stay_cheap() -> None:
    noise = passage("noise", "the grey cat sat " * 500)
    begin = time.process_time()
    found = cite("the grey cat sat on the mat " * 200, "where is it", [noise] * 6)
    assert time.process_time() - begin < 2.0
    assert 0 < len(found) <= 20
    assert all(len(f.quote.split()) <= 60 for f in found)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "shown", "removed"),
    [
        ("It is so [1]. And so [2].", "It is so [1]. And so [2].", 0),
        ("It is so [3]. Really [0].", "It is so. Really.", 2),
        ("[9] first", " first", 1),
        ("x = a[7] + b[12][3]", "x = a[7] + b[12][3]", 0),
        ("open [", "open [", 0),
        ("open [12", "open [12", 0),
        ("year [1984] and [word]", "year [1984] and [word]", 0),
        ("ends with space ", "ends with space ", 0),
        ("both [1][2][5].", "both [1][2].", 1),
        ("all wrong [8][9].", "all wrong.", 2),
    ],
)
def test_markers_of_no_passage_are_removed_however_the_text_is_cut(
    size: int, text: str, shown: str, removed: int
) -> None:
    markers = MarkerFilter(2)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert "".join([*(markers.feed(p) for p in pieces), markers.close()]) == shown
    assert markers.removed == removed


def test_without_passages_nothing_is_touched() -> None:
    markers = MarkerFilter(0)
    assert [markers.feed("see "), markers.feed("[7]"), markers.close()] == ["see ", "[7]", ""]
