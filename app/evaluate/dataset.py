"""Questions from a file: JSON (an array) or JSON lines, in CacheBlend's or in LongBench's form.

CacheBlend   {"question": ..., "answers": [...], "ctxs": [{"title": ..., "text": ...}, ...]}
LongBench    {"input": ..., "answers": [...], "context": "Passage 1:\\nTitle\\ntext\\n\\nPassage 2:\\n..."}
             where ``context`` may also be few-shot examples, each beginning with "Dialogue:" (SAMSum)

Each passage is a chunk. Neighbours with the same title are chunks of one document, all others documents of their own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from app.evaluate.errors import EvaluationError
from app.evaluate.items import Item
from app.evaluate.styles import Style

_PASSAGE = re.compile(r"^Passage \d+:[ \t]*\n", re.MULTILINE)
_SPACE = re.compile(r"\s*")
_DIALOGUE = re.compile(r"^(?=Dialogue:)", re.MULTILINE)


@dataclass(frozen=True)
class Passage:
    title: str
    text: str


@dataclass(frozen=True)
class Dataset:
    """The questions of one file. Read it with ``read_dataset``; the only task is named after the file."""

    path: Path
    digest: str
    style: Style
    items: tuple[Item, ...]
    max_chunks: int | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        return (self.path.stem,)

    @property
    def size(self) -> int | None:
        return len(self.items)

    @property
    def identity(self) -> dict[str, Any]:
        return {"data": str(self.path), "digest": self.digest, "style": self.style.name, "max_chunks": self.max_chunks}

    def item(self, task: str, index: int) -> Item:
        return self.items[index]


def read_dataset(path: Path, style: Style, *, max_chunks: int | None = None) -> Dataset:
    """Read and check the whole file. ``max_chunks``: only the first so many passages of a question are kept.

    Raises ``EvaluationError`` naming file, line and field.
    """
    if max_chunks is not None and max_chunks < 1:
        raise EvaluationError(f"max_chunks is {max_chunks}; a question needs at least 1 passage")
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as e:
        raise EvaluationError(f"{path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise EvaluationError(f"{path} is not UTF-8 (byte {e.start}); save it as UTF-8") from e
    records = _array(path, text) if text.lstrip().startswith("[") else _lines(path, text)
    items = tuple(_Record(f"{path}, line {line}", data).item(style, max_chunks) for line, data in records)
    if not items:
        raise EvaluationError(f"{path} holds no questions")
    return Dataset(path, hashlib.sha256(raw).hexdigest()[:16], style, items, max_chunks)


def _lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as e:
                raise EvaluationError(f"{path}, line {number}: this is not JSON: {e.msg}") from e


def _array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The array's elements with the lines they begin on."""
    decode = json.JSONDecoder().raw_decode
    at, line = _skip(text, text.index("[") + 1), 1
    counted = 0
    while True:
        line, counted = line + text.count("\n", counted, at), at
        if text.startswith("]", at):
            break
        try:
            record, end = decode(text, at)
        except json.JSONDecodeError as e:
            raise EvaluationError(f"{path}, line {e.lineno}: this is not JSON: {e.msg}") from e
        yield line, record
        at = _skip(text, end)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
        elif not text.startswith("]", at):
            raise EvaluationError(f"{path}: behind the question of line {line}, ',' or ']' is missing")
    if text[at + 1 :].strip():
        raise EvaluationError(f"{path}, line {line}: something follows the array of questions")


def _skip(text: str, at: int) -> int:
    """Where the white space at ``at`` ends."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


class _Record:
    """One object of the file; ``where`` names its line."""

    def __init__(self, where: str, data: Any) -> None:
        if not isinstance(data, dict):
            raise EvaluationError(f"{where}: a question is a JSON object, this is {type(data).__name__}")
        self.where, self.data = where, data

    def item(self, style: Style, max_chunks: int | None) -> Item:
        longbench = "ctxs" not in self.data and "context" in self.data
        question = self.text("input" if longbench else "question")
        passages = self.split() if longbench else self.ctxs()
        passages = passages[:max_chunks]
        starts = [0] + [i for i, (a, b) in enumerate(pairwise(passages), 1) if not a.title or a.title != b.title]
        written = [style.write_passage(p.title, p.text) for p in passages]
        documents = tuple(tuple(written[a:b]) for a, b in pairwise([*starts, len(written)]))
        return Item(
            question=style.write_question(question),
            answers=self.answers(),
            documents=documents,
            context=tuple((d, c) for d, chunks in enumerate(documents) for c in range(len(chunks))),
            where=self.where,
        )

    def text(self, field: str, *, inside: dict[str, Any] | None = None, prefix: str = "") -> str:
        data = self.data if inside is None else inside
        if field not in data:
            raise EvaluationError(f"{self.where}: field {prefix + field!r} is missing")
        value = data[field]
        if not isinstance(value, str) or not value.strip():
            raise EvaluationError(f"{self.where}: field {prefix + field!r} must be text, not {_show(value)}")
        return value

    def answers(self) -> tuple[str, ...]:
        """Gold answers; a list of lists (CacheBlend's 2WikiMQA) holds aliases of one answer each."""
        if "answers" not in self.data:
            raise EvaluationError(f"{self.where}: field 'answers' is missing")
        given = self.data["answers"]
        listed = [alias for a in given for alias in (a if isinstance(a, list) else [a])] if type(given) is list else []
        if not listed or not all(isinstance(a, str) and a.strip() for a in listed):
            raise EvaluationError(f"{self.where}: field 'answers' must be a list of texts, not {_show(given)}")
        return tuple(listed)

    def ctxs(self) -> list[Passage]:
        if "ctxs" not in self.data:
            raise EvaluationError(f"{self.where}: field 'ctxs' is missing (or LongBench's 'context')")
        given = self.data["ctxs"]
        if not isinstance(given, list) or not given or not all(isinstance(c, dict) for c in given):
            raise EvaluationError(f"{self.where}: field 'ctxs' must be a list of objects, not {_show(given)}")
        passages = []
        for i, passage in enumerate(given):
            title = passage.get("title", "")
            if not isinstance(title, str):
                raise EvaluationError(f"{self.where}: field 'ctxs[{i}].title' must be text, not {_show(title)}")
            passages.append(Passage(title, self.text("text", inside=passage, prefix=f"ctxs[{i}].")))
        return passages

    def split(self) -> list[Passage]:
        context = self.text("context")
        if _PASSAGE.search(context):
            parts = [p.strip() for p in _PASSAGE.split(context)]
            pairs = [p.partition("\n") for p in parts if p]
            return [Passage(a, b.strip()) if b.strip() else Passage("", a) for a, _, b in pairs]
        examples = [p for p in _DIALOGUE.split(context) if p.strip()]
        if len(examples) < 2:
            raise EvaluationError(f"{self.where}: field 'context' has no 'Passage 1:' or 'Dialogue:' lines to split at")
        return [Passage("", example) for example in examples]


def _show(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:60] + "..."
