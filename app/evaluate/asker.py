"""Ask: compile a question's passages behind each context, then one greedy answer per trial, one at a time."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.bench.layout import Layout, PlainLayout, PromptLayout
from app.bench.workbench import Workbench
from app.evaluate.errors import EvaluationError
from app.evaluate.items import Item
from app.evaluate.measures import diverges_at, kl_lower_bound
from app.evaluate.plan import Compile, Plan, Trial, key_context
from app.evaluate.texts import score
from blend.engines import Engine
from blend.prompt import ChunkRef, TemplateError
from blend.types import BlendStats, Prompt, Request, Sampling
from store.types import KVKey

TOP_LOGPROBS = 20

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
Record = dict[str, Any]
_Ids = tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """What one trial said. ``first`` are the top log-probabilities of its first token, token id -> logprob."""

    text: str
    token_ids: _Ids
    first: dict[int, float]
    stats: BlendStats | None


class Asker:
    """Answers the questions of ``plan`` on one engine. What is made for a question is kept until ``forget``.

    ``embed`` gives the vectors that neighbours are found by; only the compile context ``neighbours`` needs it.
    """

    def __init__(self, engine: Engine, tokenizer: Any, plan: Plan, embed: Embed | None = None) -> None:
        if embed is None and "neighbours" in plan.compiles:
            raise EvaluationError("the compile context neighbours needs an embedder")
        self.engine, self.plan = engine, plan
        self.layout = _layout(tokenizer, plan)
        self._tokenizer = tokenizer
        self._embed = embed
        salt = hashlib.sha256(b"ragblend evaluation").digest()
        compiled: set[KVKey] = set()  # shared: the prefix is the same everywhere, and first chunks may be
        self._benches: dict[Compile, Workbench] = {}
        for compile in plan.compiles:
            bench = Workbench.of(engine, tokenizer, salt=salt, compile=key_context(compile), layout=self.layout)
            self._benches[compile] = replace(bench, compiled=compiled)
        self._ids: dict[str, _Ids] = {}
        self._near: dict[tuple[tuple[str, ...], ...], list[list[int]]] = {}

    async def ask(self, item: Item, task: str, index: int, trials: Sequence[Trial], known: Record | None) -> Record:
        """The answers of ``trials``, and full prefill's from ``known`` or first. Raises ``EvaluationError``."""
        record: Record = {"task": task, "index": index, "expected": list(item.answers), "trials": {}}
        full = _full_answer(known)
        prompts: dict[Compile, Prompt] = {}
        for trial in trials:
            # Full prefill reads no stored KV: any context's prompt has the same tokens.
            compile = trial.compile or self.plan.compiles[0]
            if compile not in prompts:
                prompts[compile] = await self._prompt(compile, item, index)
            got = await self._answer(trial, prompts[compile], f"{item.where}, {trial.name}")
            if full is None:
                full = got
                record["first"] = {str(token): round(logprob, 6) for token, logprob in got.first.items()}
            record["trials"][trial.key] = self._judge(item, got, full)
        return record

    def forget(self) -> None:
        """Drop chunks, their KV and vectors: the next question has others."""
        for bench in self._benches.values():
            bench.forget()
        self._ids.clear()
        self._near.clear()

    async def _prompt(self, compile: Compile, item: Item, index: int) -> Prompt:
        """The question's prompt, and its chunks compiled behind ``compile``."""
        bench, wanted = self._benches[compile], set(item.context)
        chunks = [tuple(self._tokens(text) for text in document) for document in item.documents]
        self._check_length(item, len(self.layout.prefix) + sum(len(chunks[d][c]) for d, c in item.context))
        near = self._neighbours(compile, item, index)
        refs: dict[tuple[int, int], ChunkRef] = {}
        for d, document in enumerate(chunks):
            names = [f"{index}.{d}.{c}" for c in range(len(document))]
            need = [(d, c) in wanted for c in range(len(document))]
            if any(need):
                behind = None if near is None else near[d]
                made = await bench.compile(names, document, neighbours=behind, wanted=need)
                refs.update(((d, c), ref) for c, ref in enumerate(made))
        prompt = bench.prompt([refs[place] for place in item.context], item.question)
        self._check_length(item, len(prompt.token_ids))
        return prompt

    def _check_length(self, item: Item, tokens: int) -> None:
        limit = self.engine.info.max_context
        if tokens + self.plan.longest > limit:
            less = "--max-chunks" if self.plan.data else "fewer or smaller documents"
            raise EvaluationError(
                f"{item.where}: a prompt of {tokens} tokens and an answer of {self.plan.longest} do not fit the "
                f"model's {limit}; use {less}, or a model with a longer context"
            )

    def _tokens(self, text: str) -> _Ids:
        if text not in self._ids:
            self._ids[text] = self.layout.chunk_ids(text)
        return self._ids[text]

    def _neighbours(self, compile: Compile, item: Item, index: int) -> list[list[list[_Ids]]] | None:
        """By document and chunk, the chunks to stand in front of it, the nearest last. None: the context has none.

        ``neighbours``: nearest by the embedder among the chunks of the question's own documents, which stand for the
        collection; ``random-neighbours``: drawn from them; ``repeated-self``: the chunk itself.
        """
        count = self.plan.neighbours
        if compile == "repeated-self":
            return [[[self._tokens(text)] * count for text in document] for document in item.documents]
        if compile == "neighbours":
            chosen = self._nearest(item.documents)
        elif compile == "random-neighbours":
            chosen = _drawn(item.documents, f"{self.plan.seed} {index}", count)
        else:
            return None
        texts = [text for document in item.documents for text in document]
        behind = iter([[self._tokens(texts[i]) for i in near] for near in chosen])
        return [[next(behind) for _ in document] for document in item.documents]

    def _nearest(self, documents: tuple[tuple[str, ...], ...]) -> list[list[int]]:
        if documents not in self._near:
            assert self._embed is not None
            texts = [text for document in documents for text in document]
            vectors = self._embed(texts)
            near = []
            for i, row in enumerate(vectors @ vectors.T):
                order = [int(j) for j in np.argsort(-row, kind="stable") if texts[j] != texts[i]]
                near.append(_distinct(order, texts, self.plan.neighbours)[::-1])
            self._near[documents] = near
        return self._near[documents]

    async def _answer(self, trial: Trial, prompt: Prompt, where: str) -> Answer:
        """One greedy answer. Raises ``EvaluationError`` if compiled chunks were missing: no comparison then."""
        request = Request(
            id=f"eval-{hashlib.sha256(where.encode()).hexdigest()[:16]}",
            prompt=prompt,
            sampling=Sampling(max_tokens=self.plan.longest, temperature=0.0, logprobs=TOP_LOGPROBS),
            blend=trial.arm.options,
            tenant_salt=next(iter(self._benches.values())).keys.tenant_salt,
        )
        text, first, ids = "", dict[int, float](), list[int]()
        stats: BlendStats | None = None
        async for delta in self.engine.generate(request):
            if delta.logprobs and not ids:
                first = {token: logprob for token, _, logprob in delta.logprobs[0].top}
            text += delta.text
            ids += delta.token_ids
            stats = stats or delta.stats
        if trial.compile is not None and stats is not None and stats.missing:
            raise EvaluationError(
                f"{where}: {stats.missing} compiled rows were not in the store; raise the setting store.max_gib"
            )
        return Answer(text, tuple(ids), first, stats)

    def _judge(self, item: Item, got: Answer, full: Answer) -> Record:
        said = got.text.lstrip("\n").split("\n")[0] if self.plan.source.style.one_line else got.text
        kl = kl_lower_bound(full.first, got.first) if full.first and got.first else None
        judged: Record = {
            "text": got.text,
            "ids": list(got.token_ids),
            "scores": {name: round(value, 6) for name, value in score(said, item.answers, self._words).items()},
            "diverges": diverges_at(full.token_ids, got.token_ids),
            "kl_first": None if kl is None else round(kl, 9),
        }
        if got.stats is not None and got.stats.tokens:
            n = got.stats.tokens
            judged["context"] = n
            judged["reused"] = round(got.stats.reused / n, 6)
            judged["recomputed"] = round(got.stats.recomputed / n, 6)
            judged["computed_share"] = round(got.stats.computed_share, 6)
        return judged

    def _words(self, text: str) -> Sequence[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _layout(tokenizer: Any, plan: Plan) -> Layout:
    instruction = plan.source.style.instruction
    if plan.prompt == "plain":
        return PlainLayout(tokenizer, instruction=instruction)
    try:
        return PromptLayout(tokenizer, instruction=instruction.strip())
    except TemplateError as e:
        raise EvaluationError(f"{e}; or ask a base model with --prompt plain") from e


def _full_answer(known: Record | None) -> Answer | None:
    """Full prefill's answer as an earlier run has left it on disk."""
    if known is None:
        return None
    said = known["trials"]["full"]
    return Answer(said["text"], tuple(said["ids"]), {int(t): p for t, p in known["first"].items()}, None)


def _drawn(documents: tuple[tuple[str, ...], ...], seed: str, count: int) -> list[list[int]]:
    texts = [text for document in documents for text in document]
    chosen = []
    for i, text in enumerate(texts):
        others = [j for j in range(len(texts)) if texts[j] != text]
        chosen.append(_distinct(random.Random(f"{seed} {i}").sample(others, len(others)), texts, count))
    return chosen


def _distinct(order: Sequence[int], texts: Sequence[str], count: int) -> list[int]:
    """The first ``count`` of ``order`` whose texts differ from one another."""
    found: dict[str, int] = {}
    for i in order:
        found.setdefault(texts[i], i)
    return list(found.values())[:count]
