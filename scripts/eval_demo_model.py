"""Measure the demo model: full prefill against reuse of KV compiled per chunk or per document, re-rotated.

Plain transformers in float32, nothing of blend: an independent truth for the harness and for models/demo/README.md.
"""

import argparse
import copy
import json
import sys
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from app.demo.world import (
    CHUNK_END,
    EVAL_SEEDS,
    EXAMPLE_CHUNK_TOKENS,
    SYSTEM_PREFIX,
    TASKS,
    Example,
    Question,
    WorldDocument,
    make_example,
)
from scripts.demo_training.model import rotate

ARMS = ("full", "reuse-prefix", "reuse-document")
MOST_ANSWER_TOKENS = 8
Layers = list[tuple[Tensor, Tensor]]


class Evaluator:
    """Segments are joined by token ids, compiled KV by position."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.prefix = self._ids("<s><|system|>" + SYSTEM_PREFIX)
        self.fused: dict[str, tuple[Any, DynamicCache]] = {}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _prefill(self, ids: list[int], cache: DynamicCache) -> Tensor:
        """Logits of the last row; the cache grows by len(ids) rows at consecutive positions."""
        return self.model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1).logits[0, -1]

    def _moved(self, k: Tensor, delta: int) -> Tensor:
        """Keys [1, heads, rows, dim] rotated on by `delta` positions."""
        frequencies = self.model.model.rotary_emb.inv_freq.float()
        angles = torch.cat([frequencies, frequencies]) * delta
        return rotate(k, angles.cos(), angles.sin())

    def _compiled(self, document: WorldDocument, arm: str) -> list[tuple[int, Layers]]:
        """Per chunk of the document: the position it was compiled at and its K and V, every layer."""
        head, chunks, parts = len(self.prefix), [self._ids(c + CHUNK_END) for c in document.chunks], []
        for group in [chunks] if arm == "reuse-document" else [[chunk] for chunk in chunks]:
            cache = DynamicCache()
            self._prefill(self.prefix + [i for chunk in group for i in chunk], cache)
            start = head
            for chunk in group:
                rows = slice(start, start + len(chunk))
                parts.append((start, [(layer.keys[:, :, rows], layer.values[:, :, rows]) for layer in cache.layers]))
                start += len(chunk)
        return parts

    def context(self, example: Example, arm: str) -> DynamicCache:
        """The cache of prefix and retrieved chunks under an arm; the last one per arm is kept."""
        key = (example.documents, example.context)
        if arm not in self.fused or self.fused[arm][0] != key:
            self.fused[arm] = (key, self._full(example) if arm == "full" else self._reused(example, arm))
        return copy.deepcopy(self.fused[arm][1])

    def _full(self, example: Example) -> DynamicCache:
        cache = DynamicCache()
        text = [self._ids(example.documents[d].chunks[c] + CHUNK_END) for d, c in example.context]
        self._prefill(self.prefix + [i for chunk in text for i in chunk], cache)
        return cache

    def _reused(self, example: Example, arm: str) -> DynamicCache:
        cache = DynamicCache()
        self._prefill(self.prefix, cache)
        place = len(self.prefix)
        compiled = [self._compiled(document, arm) for document in example.documents]
        for document, chunk in example.context:
            start, layers = compiled[document][chunk]
            for index, (k, v) in enumerate(layers):
                cache.update(self._moved(k, place - start), v, index)
            place += layers[0][0].shape[2]
        return cache

    def answer(self, question: Question, cache: DynamicCache) -> str:
        """Greedy answer text behind a context; the cache is used up."""
        ids = self._ids(f"</s><|user|>{question.text}</s><|assistant|>")
        said: list[int] = []
        while len(said) < MOST_ANSWER_TOKENS:
            token = int(self._prefill(ids, cache).argmax())
            if token == self.tokenizer.eos_token_id:
                break
            said.append(token)
            ids = [token]
        return self.tokenizer.decode(said)


@torch.inference_mode()
def count(args: argparse.Namespace, documents: int, share: int) -> Counter[Any]:
    """Right answers per (task, arm) and rows of the contexts, over every `jobs`-th seed from `share` on."""
    torch.set_num_threads(1)
    evaluator = Evaluator(args.model)
    counted: Counter[Any] = Counter()
    shape = {"documents": documents, "chunks": args.chunks, "chunk_tokens": tuple(args.chunk_tokens)}
    seeds = range(args.first_seed + share, args.first_seed + args.questions, args.jobs)
    for done, seed in enumerate(seeds, 1):
        for task in args.tasks:
            example = make_example(EVAL_SEEDS[seed], task=task, **shape)
            for arm in args.arms:
                cache = evaluator.context(example, arm)
                counted["rows"] += cache.get_seq_length()
                counted[task, arm] += evaluator.answer(example.question, cache) == example.question.answer
        if done % 20 == 0:
            so_far = {f"{t} {arm}": counted[t, arm] for t in args.tasks for arm in args.arms}
            print(f"share {share}: right after {done} of {len(seeds)} contexts: {so_far}", file=sys.stderr, flush=True)
    return counted


def measure(args: argparse.Namespace, documents: int) -> dict[str, Any]:
    """Exact-answer accuracy per task and arm over held-out examples, and the mean context length in tokens."""
    with get_context("spawn").Pool(args.jobs) as pool:
        parts = pool.starmap(count, [(args, documents, share) for share in range(args.jobs)])
    counted = sum(parts, Counter())
    answers = args.questions * len(args.tasks) * len(args.arms)
    shape = {"documents": documents, "chunks": args.chunks, "chunk_tokens": args.chunk_tokens}
    tasks = {t: {arm: round(counted[t, arm] / args.questions, 4) for arm in args.arms} for t in args.tasks}
    return {**shape, "context_tokens": round(counted["rows"] / answers), "questions": args.questions, "tasks": tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--documents", type=int, nargs="+", default=[8], help="documents per context")
    parser.add_argument("--chunks", type=int, default=2, help="chunks per document")
    parser.add_argument("--chunk-tokens", type=int, nargs=2, default=EXAMPLE_CHUNK_TOKENS, metavar=("LEAST", "MOST"))
    parser.add_argument("--questions", type=int, default=400, help="questions per task")
    parser.add_argument("--first-seed", type=int, default=1000, help="offset into the evaluation seeds")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    args = parser.parse_args()
    for documents in args.documents:
        print(json.dumps(measure(args, documents)), flush=True)


if __name__ == "__main__":
    main()
