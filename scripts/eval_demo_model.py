"""Measure the demo model: full prefill against reuse of KV compiled per chunk or per document, re-rotated."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from app.demo.world import CHUNK_END, EVAL_SEEDS, SYSTEM_PREFIX, TASKS, Example, make_example
from scripts.demo_training.model import rotate

ARMS = ("full", "reuse-prefix", "reuse-document")
Layers = list[tuple[Tensor, Tensor]]


class Evaluator:
    """Plain transformers in float32: segments are joined by token ids, compiled KV by position."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.prefix = self._ids("<s><|system|>" + SYSTEM_PREFIX)

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

    def context(self, example: Example, arm: str) -> tuple[DynamicCache, int]:
        """The cache of prefix and chunks under an arm, and its number of rows."""
        groups = [[self._ids(c + CHUNK_END) for c in d.chunks] for d in example.documents]
        cache = DynamicCache()
        if arm == "full":
            ids = self.prefix + [i for group in groups for chunk in group for i in chunk]
            self._prefill(ids, cache)
            return cache, len(ids)
        if arm == "reuse-prefix":
            groups = [[chunk] for group in groups for chunk in group]
        self._prefill(self.prefix, cache)
        head, place = len(self.prefix), len(self.prefix)
        for group in groups:
            own = [i for chunk in group for i in chunk]
            compiled = DynamicCache()
            self._prefill(self.prefix + own, compiled)
            for index, layer in enumerate(compiled.layers):
                keys = self._moved(layer.keys[:, :, head:], place - head)
                cache.update(keys, layer.values[:, :, head:], index)
            place += len(own)
        return cache, place

    def answer(self, example: Example, arm: str) -> tuple[str, int]:
        """Greedy answer text and the rows of the context."""
        cache, rows = self.context(example, arm)
        ids = self._ids(f"</s><|user|>{example.question.text}</s><|assistant|>")
        said: list[int] = []
        while len(said) < 8:
            token = int(self._prefill(ids, cache).argmax())
            if token == self.tokenizer.eos_token_id:
                break
            said.append(token)
            ids = [token]
        return self.tokenizer.decode(said), rows


@torch.inference_mode()
def measure(folder: Path, documents: int, chunks: int, n: int, first: int, arms: tuple[str, ...]) -> dict:
    """Exact-answer accuracy per task and arm over n held-out examples each, and the mean context length."""
    evaluator = Evaluator(folder)
    result: dict = {"documents": documents, "chunks": chunks, "n": n}
    lengths = []
    for task in TASKS:
        right = dict.fromkeys(arms, 0)
        for seed in range(first, first + n):
            example = make_example(EVAL_SEEDS[seed], documents=documents, task=task, chunks=chunks)
            for arm in arms:
                text, rows = evaluator.answer(example, arm)
                right[arm] += text == example.question.answer
                lengths.append(rows)
        result[task] = {arm: right[arm] / n for arm in arms}
    result["context_tokens"] = round(sum(lengths) / len(lengths))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--documents", type=int, nargs="+", default=[3, 12], help="documents per context")
    parser.add_argument("--chunks", type=int, default=2, help="chunks per document")
    parser.add_argument("--questions", type=int, default=300, help="questions per task")
    parser.add_argument("--first-seed", type=int, default=1000, help="offset into the evaluation seeds")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for documents in args.documents:
        measured = measure(args.model, documents, args.chunks, args.questions, args.first_seed, tuple(args.arms))
        print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
