"""Questions from files: both forms are read, faults are named by file, line and field, prompts are the papers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.bench.layout import PlainLayout
from app.evaluate.dataset import Dataset, read_dataset
from app.evaluate.errors import EvaluationError
from app.evaluate.plan import Plan, make_arms
from app.evaluate.quality import run_quality
from app.evaluate.styles import STYLES, find_style
from app.trivial import ByteTokenizer, TrivialEngine
from blend.types import Request
from store.memory import MemoryStore

DATA = Path(__file__).parent / "questions.jsonl"
MUSIQUE = Path(__file__).resolve().parents[3] / "shared/data/musique_dev.json"
GOOD = {"question": "Who?", "answers": ["Ida"], "ctxs": [{"title": "", "text": "Ida did."}]}


def read(path: Path, style: str = "hotpotqa", **options: Any) -> Dataset:
    return read_dataset(path, find_style(style), **options)


def test_both_forms_are_read() -> None:
    items = read(DATA).items
    assert [item.answers for item in items] == [
        ("Lindhaven", "the harbour of Lindhaven"),
        ("Ida Voss", "Voss"),
        ("yes",),
    ]
    assert [len(item.context) for item in items] == [3, 2, 3]
    assert items[2].documents[0] == ("Torne\nThe lake of Torne is 140 metres deep.\n\n",)


def test_neighbours_with_one_title_are_one_document() -> None:
    items = read(DATA).items
    assert [len(d) for d in items[2].documents] == [1, 2]
    assert items[2].context == ((0, 0), (1, 0), (1, 1))
    assert [len(d) for d in items[1].documents] == [1, 1]  # no titles: nothing says that they belong together


def test_an_array_is_read_like_lines(tmp_path: Path) -> None:
    records = [json.loads(line) for line in DATA.read_text().splitlines()]
    for indent in (None, 2):
        array = tmp_path / "array.json"
        array.write_text(json.dumps(records, indent=indent))
        assert [(i.question, i.documents) for i in read(array).items] == [
            (i.question, i.documents) for i in read(DATA).items
        ]


def test_examples_of_dialogues_are_split(tmp_path: Path) -> None:
    path = tmp_path / "samsum.jsonl"
    context = "Dialogue: A: hi\nSummary: A says hi.\nDialogue: B: bye\nSummary: B leaves."
    path.write_text(json.dumps({"input": "Dialogue: C: hm\nSummary:", "context": context, "answers": ["C doubts."]}))
    (item,) = read(path, "summarize").items
    assert item.documents == (("Dialogue: A: hi\nSummary: A says hi.\n",), ("Dialogue: B: bye\nSummary: B leaves.",))
    assert item.question == "\n\nDialogue: C: hm\nSummary:"


def test_only_the_first_passages_are_kept() -> None:
    assert [len(i.context) for i in read(DATA, max_chunks=2).items] == [2, 2, 2]
    with pytest.raises(EvaluationError, match="max_chunks is 0"):
        read(DATA, max_chunks=0)


def _without(field: str) -> dict[str, Any]:
    return {k: v for k, v in GOOD.items() if k != field}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (_without("question"), "'question' is missing"),
        (_without("answers"), "'answers' is missing"),
        (_without("ctxs"), "'ctxs' is missing"),
        (GOOD | {"question": 7}, "'question' must be text, not 7"),
        (GOOD | {"question": "  "}, "'question' must be text"),
        (GOOD | {"answers": []}, r"'answers' must be a list of texts, not \[\]"),
        (GOOD | {"answers": "Ida"}, "'answers' must be a list of texts, not \"Ida\""),
        (GOOD | {"answers": ["Ida", None]}, "'answers' must be a list"),
        (GOOD | {"ctxs": []}, "'ctxs' must be a list of objects"),
        (GOOD | {"ctxs": ["text"]}, "'ctxs' must be a list of objects"),
        (GOOD | {"ctxs": [*GOOD["ctxs"], {"title": "x"}]}, r"'ctxs\[1\].text' is missing"),
        (GOOD | {"ctxs": [{"title": 3, "text": "x"}]}, r"'ctxs\[0\].title' must be text, not 3"),
        ({"input": "Who?", "answers": ["Ida"], "context": "Ida did."}, "'context' has no 'Passage 1:'"),
        ([GOOD], "is a JSON object, this is list"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_file_line_and_field(tmp_path: Path, record: object, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(record)}\n")
    with pytest.raises(EvaluationError, match=rf"bad\.jsonl, line 3: .*{words}"):
        read(path)
    path.write_text(f"[\n{json.dumps(GOOD)},\n{json.dumps(record)}\n]")
    with pytest.raises(EvaluationError, match=rf"bad\.jsonl, line 3: .*{words}"):
        read(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"question": "Who?"', "line 1: this is not JSON"),
        (json.dumps(GOOD) + "\n{oops}\n", "line 2: this is not JSON"),
        ("[\n" + json.dumps(GOOD) + ",\n{oops}]", "line 3: this is not JSON"),
        ("[\n" + json.dumps(GOOD), "',' or ']' is missing"),
        ("[" + json.dumps(GOOD) + "] and more", "line 1: something follows"),
        ("", "holds no questions"),
        ("[]", "holds no questions"),
    ],
)
def test_broken_json_is_named_by_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=rf"broken\.json.*{words}"):
        read(path)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"nowhere\.json cannot be read: No such file"):
        read(tmp_path / "nowhere.json")
    (tmp_path / "latin.json").write_bytes(b'[{"question": "K\xf6ln"}]')
    with pytest.raises(EvaluationError, match=r"latin\.json is not UTF-8 \(byte 16\)"):
        read(tmp_path / "latin.json")
    with pytest.raises(EvaluationError, match=r"'haiku' is unknown; choose one of musique"):
        find_style("haiku")


def test_cacheblends_prompt_is_theirs_to_the_letter() -> None:
    style = find_style("musique")
    assert style.instruction == (
        "You will be asked a question after reading several passages. Please directly answer the question based on "
        "the given passages. Do NOT repeat the question. The answer should be within 5 words..\nPassages:\n"
    )
    assert style.write_passage("Torne", "A lake.") == "Torne\n\nA lake.\n\n"
    assert style.write_question("Who painted {it}") == (
        "\n\nAnswer the question directly based on the given passages. Do NOT repeat the question. The answer should "
        "be within 5 words. \nQuestion:who painted {it}?\nAnswer:"
    )


@pytest.mark.parametrize("name", STYLES)
async def test_a_plain_prompt_is_instruction_passages_and_question(name: str) -> None:
    engine = TrivialEngine(MemoryStore())
    seen: list[Request] = []
    generate = engine.generate
    engine.generate = lambda request: (seen.append(request), generate(request))[1]  # type: ignore[method-assign]
    style = find_style(name)
    data = read_dataset(DATA, style)
    plan = Plan(make_arms(["heads"], [0.1]), questions=1, data=data, prompt="plain")
    report = await run_quality(engine, engine.tokenizer, plan)
    (item, *_) = data.items
    said = style.instruction + "".join(t for d in item.documents for t in d) + item.question
    assert {engine.tokenizer.decode(r.prompt.token_ids) for r in seen} == {said}
    assert {r.sampling.max_tokens for r in seen} == {style.max_tokens}
    assert report["metric"] == style.metric
    assert list(report["tasks"]) == ["questions"]
    engine.store.close()


def test_a_plain_prompt_begins_as_the_tokenizer_begins() -> None:
    class Beginning(ByteTokenizer):
        bos_token_id = 256

        def __call__(self, text: str, *, add_special_tokens: bool = False, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [256] * add_special_tokens + list(text.encode())}

    assert PlainLayout(Beginning(), instruction="ab").prefix == (256, 97, 98)
    assert PlainLayout(ByteTokenizer(), instruction="ab").prefix == (97, 98)
    with pytest.raises(ValueError, match="instruction of a plain prompt is empty"):
        PlainLayout(ByteTokenizer(), instruction="")


async def test_a_tokenizer_without_a_template_is_told_of_plain_prompts() -> None:
    class Base(ByteTokenizer):
        chat_template = ""

    engine = TrivialEngine(MemoryStore())
    with pytest.raises(EvaluationError, match="--prompt plain"):
        await run_quality(engine, Base(), Plan(make_arms(["heads"], [0.1]), data=read(DATA)))
    engine.store.close()


@pytest.mark.skipif(not MUSIQUE.is_file(), reason="the MuSiQue sample is not part of the project")
def test_the_published_musique_sample_is_read() -> None:
    items = read(MUSIQUE, "musique").items
    assert len(items) == 100
    assert all(len(item.context) == 10 for item in items)
    assert all(item.question.endswith("?\nAnswer:") for item in items)
