"""Other papers' repairs on our questions: patches, shifts and half repairs against recomputing the same rows.

Every arm starts from KV compiled behind the prefix only (the hard case), gets the same selected rows, and answers the
same questions; `full` and `document` bound it from above. Results go to LOG.md by hand, negative ones too.

    low rank     Kamera (arXiv 2606.23581): KV behind the document minus KV alone, a patch of rank m by chunk and layer
    shift        AgentKVShift (2607.21604), KVCOMM (2510.12872): the selected rows' mean change, added to the other rows
    K only, V only   the selected rows' fresh keys, or fresh values, with the stored other half
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import AutoTokenizer

from app.demo.world import EVAL_SEEDS, Example, make_example
from app.evaluate.measures import is_right, mean_and_interval
from blend.engines.base import EngineConfig
from blend.engines.transformers.model import RowModel, Weights, load_weights
from blend.fingerprint import tokenizer_fingerprint
from blend.keys import KeyMaker
from blend.load import load
from blend.method import Blend, compile_into, walk
from blend.model import Observed
from blend.prompt import ChunkRef, PromptLayout
from blend.select import open_selector
from blend.types import Prompt
from store.memory import MemoryStore

ANSWER_TOKENS = 8
SALT = bytes(32)


@dataclass(frozen=True)
class Fused:
    """A fused cache before repair: the request's model and blend state."""

    model: RowModel
    state: Blend


class Study:
    """One model, and its questions one after the other."""

    def __init__(self, folder: Path) -> None:
        self.weights: Weights = load_weights(EngineConfig(str(folder), dtype="float32", device="cpu"))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.layout = PromptLayout(self.tokenizer)
        self.identity = tokenizer_fingerprint(folder)
        self.alone = KeyMaker(self.weights.layout, self.identity, SALT, self.layout.prefix, context="prefix")
        self.behind = replace(self.alone, context="document")

    def compile(self, example: Example, keys: KeyMaker, store: MemoryStore) -> dict[tuple[int, int], ChunkRef]:
        """All chunks of the example's documents, compiled into ``store``; by (document, chunk)."""
        refs: dict[tuple[int, int], ChunkRef] = {}
        prefix = keys.prefix_job()
        compile_into(RowModel(self.weights, prefix.tokens), prefix, store, tokenizer=self.identity)
        for d, document in enumerate(example.documents):
            ids = [self.layout.chunk_ids(text) for text in document.chunks]
            made = keys.document([f"{d}.{c}" for c in range(len(ids))], ids)
            for job in keys.jobs(made):
                compile_into(RowModel(self.weights, job.tokens), job, store, tokenizer=self.identity)
            refs |= {(d, c): ref for c, ref in enumerate(made)}
        return refs

    def prompt(self, example: Example, keys: KeyMaker, refs: dict[tuple[int, int], ChunkRef]) -> Prompt:
        messages = [{"role": "user", "content": example.question.text}]
        return self.layout.build([refs[place] for place in example.context], messages, keys.prefix_ref())

    def fuse(self, prompt: Prompt, store: MemoryStore, ratio: float) -> Fused:
        model = RowModel(self.weights, len(prompt.token_ids) + ANSWER_TOKENS)
        loaded = load(model, prompt, store, tokenizer=self.identity)
        budget = int(ratio * prompt.context_tokens)
        return Fused(model, Blend(model, prompt, loaded, 0, len(prompt.token_ids) - 1, budget))

    def answer(self, model: RowModel, prompt: Prompt) -> str:
        """Greedy answer on the cache that ``model`` holds for all rows but the last."""
        row, token, said = len(prompt.token_ids) - 1, prompt.token_ids[-1], list[int]()
        while len(said) < ANSWER_TOKENS:
            one = torch.tensor([token])
            hidden = walk(model, one, torch.tensor([row]), hidden=model.embed(one))
            row, token = row + 1, int(model.logits(hidden)[0].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            said.append(token)
        return str(self.tokenizer.decode(said))


Repair = Callable[[Fused, Tensor], None]
"""Given the fused cache and the rows to repair, leave every row but the last one ready in the model's cache."""


def fresh(fused: Fused, rows: Tensor) -> tuple[Tensor, Tensor]:
    """K and V [L, R, H, D] of ``rows`` recomputed together with the question, which stays in the cache."""
    ks, vs = [], []

    def keep(_: int, seen: Observed) -> None:
        ks.append(seen.k[: rows.numel()].clone())
        vs.append(seen.v[: rows.numel()].clone())

    fused.state.walk(torch.cat([rows, fused.state.question_rows]), watch=keep)
    return torch.stack(ks), torch.stack(vs)


def recompute(fused: Fused, rows: Tensor) -> None:
    fresh(fused, rows)


def half(which: str) -> Repair:
    """Only the rows' keys (``k``) or only their values (``v``) are replaced; then the question runs again."""

    def repair(fused: Fused, rows: Tensor) -> None:
        k, v = fresh(fused, rows)
        old = fused.state.loaded
        for layer in range(k.shape[0]):
            fused.model.write_kv(
                layer,
                rows,
                k[layer] if which == "k" else old.k[layer, rows],
                v[layer] if which == "v" else old.v[layer, rows],
            )
        fused.state.walk(fused.state.question_rows)

    return repair


def shift(weight: float) -> Repair:
    """``weight`` x the mean change of a chunk's selected rows goes to its other rows, K and V apart, by layer.

    K is shifted as it stands, rotated: rows of one chunk are near one another, so this is AgentKVShift's mean up to the
    rotation between them (the slow frequencies, which carry content, hardly turn).
    """

    def repair(fused: Fused, rows: Tensor) -> None:
        k, v = fresh(fused, rows)
        old = fused.state.loaded
        for s in fused.state.prompt.segments:
            mine = (rows >= s.start) & (rows < s.stop)
            if s.kind != "chunk" or not mine.any():
                continue
            others = torch.tensor([r for r in range(s.start, s.stop) if r not in set(rows[mine].tolist())])
            if not others.numel():
                continue
            for layer in range(k.shape[0]):
                dk = (k[layer, mine] - old.k[layer, rows[mine]]).mean(0)
                dv = (v[layer, mine] - old.v[layer, rows[mine]]).mean(0)
                fused.model.write_kv(
                    layer, others, old.k[layer, others] + weight * dk, old.v[layer, others] + weight * dv
                )
        fused.state.walk(fused.state.question_rows)

    return repair


def patch(rank: int, behind: Tensor, values: Tensor) -> Repair:
    """Stored KV plus the rank-``rank`` part of (KV behind the document - KV alone), by chunk and layer.

    ``behind``, ``values`` [L, N, H, D]: K and V compiled behind the document, at the prompt's positions. With rotation
    undone the change of K would be a little lower in rank; within a chunk of some hundred rows it hardly matters.
    """

    def repair(fused: Fused, rows: Tensor) -> None:
        old = fused.state.loaded
        for s in fused.state.prompt.segments:
            if s.kind != "chunk":
                continue
            part = torch.arange(s.start, s.stop)
            for layer in range(old.k.shape[0]):
                changed = []
                for stored, target in ((old.k, behind), (old.v, values)):
                    delta = (target[layer, part] - stored[layer, part]).flatten(1)
                    u, sigma, w = torch.linalg.svd(delta, full_matrices=False)
                    low = (u[:, :rank] * sigma[:rank]) @ w[:rank]
                    changed.append(stored[layer, part] + low.view_as(stored[layer, part]))
                fused.model.write_kv(layer, part, *changed)
        fused.state.walk(fused.state.question_rows)

    return repair


def ask(study: Study, example: Example, selector: str, ratio: float, ranks: list[int]) -> dict[str, str]:
    """The answer of every arm to one question."""
    alone, behind = MemoryStore(), MemoryStore()
    refs, whole = study.compile(example, study.alone, alone), study.compile(example, study.behind, behind)
    prompt, prompt_behind = study.prompt(example, study.alone, refs), study.prompt(example, study.behind, whole)
    none = torch.empty(0, dtype=torch.int64)
    said: dict[str, str] = {}

    def run(name: str, repair: Repair, rows: Tensor, *, document: bool = False) -> None:
        fused = study.fuse(prompt_behind if document else prompt, behind if document else alone, ratio)
        repair(fused, rows)
        said[name] = study.answer(fused.model, prompt)

    fused = study.fuse(prompt, alone, ratio)
    fresh(fused, torch.arange(prompt.context_tokens))
    said["full"] = study.answer(fused.model, prompt)
    run("reuse", recompute, none)
    run("reuse, document", recompute, none, document=True)
    rows = open_selector(selector).select(study.fuse(prompt, alone, ratio).state).rows
    run("recompute", recompute, rows)
    run("K only", half("k"), rows)
    run("V only", half("v"), rows)
    for weight in (0.5, 1.0):
        run(f"recompute + shift x {weight}", shift(weight), rows)
    target = study.fuse(prompt_behind, behind, ratio).state.loaded
    for rank in ranks:
        run(f"low rank {rank}", patch(rank, target.k, target.v), none)
    return said


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--task", nargs="+", default=["same-chunk", "cross-chunk"])
    parser.add_argument("--questions", type=int, default=100, help="per task")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--selector", default="auto", help="whose rows are repaired")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--rank", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--first-seed", type=int, default=9_000_000, help="offset into the evaluation seeds")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    study = Study(args.model)
    for task in args.task:
        right: dict[str, list[float]] = {}
        for i in range(args.questions):
            example = make_example(EVAL_SEEDS.start + args.first_seed + i, task=task, documents=args.documents)
            for arm, text in ask(study, example, args.selector, args.ratio, args.rank).items():
                right.setdefault(arm, []).append(float(is_right(text, example.question.answer)))
        for arm, marks in right.items():
            mean, interval = mean_and_interval(marks)
            record = {"task": task, "arm": arm, "accuracy": round(mean, 3), "ci95": [round(x, 3) for x in interval]}
            print(json.dumps(record | {"n": len(marks)}), flush=True)


if __name__ == "__main__":
    main()
