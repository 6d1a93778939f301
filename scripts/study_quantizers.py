"""Why the codecs are as they are: the measurements behind store/codec, on full prefills of the demo model.

anchors   what is left of the variance of K and V after taking off an anchor token, the token before, the mean
error     bits of a value, and error of the question rows' attention, by quantiser (K quantised, or V, at 4 bits)
depth     KL of the first answer token with all chunks' KV coded, steps by third of the layers, K and V apart
coders    zstd against rANS (`pip install constriction`, if it is to be compared): bits and rate
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import zstandard
from torch import Tensor
from transformers import AutoTokenizer

from app.demo.world import EVAL_SEEDS, TASKS, make_example
from blend.engines.base import EngineConfig
from blend.engines.transformers.model import RowModel, Weights, load_weights
from blend.fingerprint import tokenizer_fingerprint
from blend.keys import KeyMaker
from blend.method import walk
from blend.model import Observed
from blend.prompt import PromptLayout
from store.codec.affine import down, quantize
from store.codec.entropy import quantize_centred

HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Prefilled:
    """A full prefill: the model's cache, Q [L, Nq, Hq, D] of the question, K and V [L, N, H, D], the chunks' rows."""

    model: RowModel
    ids: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    chunks: list[slice]
    context: int

    def planes(self) -> Iterator[tuple[str, int, Tensor]]:
        """Every chunk's K and V by layer: name, layer, [T, H, D]."""
        for name, x in (("K", self.k), ("V", self.v)):
            for layer, chunk in itertools.product(range(x.shape[0]), self.chunks):
                yield name, layer, x[layer, chunk]


def prefills(args: argparse.Namespace) -> Iterator[Prefilled]:
    weights: Weights = load_weights(EngineConfig(str(args.model), dtype="float32", device="cpu"))
    layout = PromptLayout(AutoTokenizer.from_pretrained(args.model))
    keys = KeyMaker(weights.layout, tokenizer_fingerprint(args.model), bytes(32), layout.prefix, context="prefix")
    for i in range(args.questions):
        task = TASKS[i % len(TASKS)]
        example = make_example(EVAL_SEEDS.start + args.first_seed + i, task=task, documents=8)
        refs = {}
        for d, document in enumerate(example.documents):
            ids = [layout.chunk_ids(text) for text in document.chunks]
            refs |= {(d, c): ref for c, ref in enumerate(keys.document([f"{d}.{c}" for c in range(len(ids))], ids))}
        asked = [{"role": "user", "content": example.question.text}]
        prompt = layout.build([refs[place] for place in example.context], asked, keys.prefix_ref())
        tokens, n = torch.tensor(prompt.token_ids), prompt.context_tokens
        model, seen = RowModel(weights, len(tokens)), list[Observed]()
        walk(model, tokens, torch.arange(len(tokens)), watch=lambda _, o, seen=seen: seen.append(o))
        q, k, v = (torch.stack([getattr(o, x) for o in seen]) for x in "qkv")
        chunks = [slice(s.start, s.stop) for s in prompt.segments if s.kind == "chunk"]
        yield Prefilled(model, tokens, q[:, n:].clone(), k[:, :n].clone(), v[:, :n].clone(), chunks, n)


def anchors(args: argparse.Namespace) -> None:
    """Variance left, as a share of the mean square: by name, the mean over planes."""
    sums: dict[str, list[float]] = {}
    bits: dict[str, list[list[float]]] = {}
    for one in prefills(args):
        for name, _, x in one.planes():
            rows = x.flatten(1).double()
            first = rows[::10].repeat_interleave(10, 0)[: len(rows)]
            others = torch.arange(len(rows)) % 10 != 0
            power = {
                "as it is": rows, "token before": rows.diff(dim=0), "anchor token (10)": (rows - first)[others],
                "chunk's mean": rows - rows.mean(0),
            }  # fmt: skip
            for how, left in power.items():
                sums.setdefault(f"{name}, {how}", []).append(float(left.square().mean()))
            codes = quantize_centred(x.flatten(1), x.shape[1], 0.25)[0].long()
            plain, moved = entropy_by_channel(codes), entropy_by_channel(codes.diff(dim=0, prepend=codes[:1]) % 256)
            kinds = (plain, moved, torch.minimum(plain, moved))
            bits.setdefault(name, []).append([float(kind.mean()) for kind in kinds])
    for how, values in sums.items():
        whole = sums[f"{how[0]}, as it is"]
        print(json.dumps({"left of": how, "share": round(sum(values) / sum(whole), 3), "planes": len(values)}))
    for name, each in bits.items():
        codes, differences, better = torch.tensor(each).mean(0).tolist()
        print(json.dumps({"codes of": name, "bits": round(codes, 2), "differences": round(differences, 2),
                          "better": round(better, 2)}))  # fmt: skip


def entropy_by_channel(codes: Tensor) -> Tensor:
    """Bits of a value of each channel [C] of ``codes`` [T, C] int64 0..255, coded each by its own frequencies."""
    counts = torch.zeros(256, codes.shape[1]).scatter_add_(0, codes, torch.ones(codes.shape))
    share = counts / len(codes)
    return -(share * share.clamp_min(1e-30).log2()).sum(0)


Quantiser = Callable[[Tensor], tuple[Tensor, float]]
"""[T, H, D] to what its codes decode to, and the bits of a value, steps and offsets included (16 bits each)."""


def by_channel(tokens: int, *, clip: float | None = None) -> Quantiser:
    """16 levels of each channel in groups of ``tokens``; ``clip``: nothing beyond so many standard deviations."""

    def quantise(x: Tensor) -> tuple[Tensor, float]:
        rows, made = x.flatten(1), []
        for part in rows.split(tokens):
            kept = part
            if clip is not None:
                far = clip * part.std(0)
                kept = part.clamp(part.mean(0) - far, part.mean(0) + far)
            low = kept.amin(0, keepdim=True)
            codes, step = quantize(kept, low, 0, 16)
            made.append(codes * step + low)
        return torch.cat(made).view_as(x), 4 + 32 * len(made) / len(rows)

    return quantise


def by_token(channels: int, *, centred: bool) -> Quantiser:
    """16 levels of each token in groups of ``channels``; ``centred``: after taking off the chunk's mean."""

    def quantise(x: Tensor) -> tuple[Tensor, float]:
        rows = x.flatten(1)
        mean = rows.mean(0, keepdim=True) if centred else torch.zeros(1, rows.shape[1])
        grouped = (rows - mean).view(len(rows), -1, channels)
        low = down(grouped.amin(2, keepdim=True))
        codes, step = quantize(grouped, low, 2, 16)
        return ((codes * step + low).flatten(1) + mean).view_as(x), 4 + 32 / channels + 16 * centred / len(rows)

    return quantise


def entropy(steps: float) -> Quantiser:
    def quantise(x: Tensor) -> tuple[Tensor, float]:
        codes, step, mean = quantize_centred(x.flatten(1), x.shape[1], steps)
        coded = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(codes.numpy().data)
        return ((codes.float() - 128) * step + mean).view_as(x), 8 * len(coded) / codes.numel() + 32 / len(x)

    return quantise


def error(args: argparse.Namespace) -> None:
    tried: dict[str, Quantiser] = {
        "channel": by_channel(1 << 20), "channel, 128 tokens": by_channel(128), "channel, 32 tokens": by_channel(32),
        "channel, clipped at 3 sd": by_channel(1 << 20, clip=3.0), "token, 64 channels": by_token(64, centred=False),
        "token, 64 channels, centred": by_token(64, centred=True), "entropy 0.25 sd": entropy(0.25),
        "entropy 0.35 sd": entropy(0.35), "entropy 0.5 sd": entropy(0.5),
    }  # fmt: skip
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for one in prefills(args):
        for (name, quantise), which, layer in itertools.product(tried.items(), "KV", range(one.k.shape[0])):
            k, v = one.k[layer].clone(), one.v[layer].clone()
            bits = []
            for chunk in one.chunks:
                x = k if which == "K" else v
                x[chunk], size = quantise(x[chunk])
                bits.append(size)
            want, got = attend(one, layer, one.k[layer], one.v[layer]), attend(one, layer, k, v)
            off = float(((got - want).norm(dim=-1) / want.norm(dim=-1)).mean())
            found.setdefault((which, name), []).append((off, sum(bits) / len(bits)))
    for (which, name), values in sorted(found.items()):
        off, size = (sum(x) / len(values) for x in zip(*values, strict=True))
        print(json.dumps({"of": which, "quantiser": name, "attention error": round(off, 4), "bits": round(size, 2)}))


def attend(one: Prefilled, layer: int, k: Tensor, v: Tensor) -> Tensor:
    """What the question's rows read from the context, [Hq, Nq, D]."""
    group = one.q.shape[2] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    return torch.softmax(one.q[layer].transpose(0, 1) @ k.transpose(1, 2) * one.model.scale, -1) @ v


def depth(args: argparse.Namespace) -> None:
    thirds = {"alike": (1, 1, 1), "first third finer": (0.75, 1, 1.33), "last third finer": (1.33, 1, 0.75)}
    found: dict[str, list[tuple[float, float]]] = {}
    for one in prefills(args):
        want = first_token(one)
        for (name, factors), step, wider in itertools.product(thirds.items(), (0.5, 1.0), (1, 2)):
            bits = []
            layers = one.k.shape[0]
            for layer, chunk in itertools.product(range(layers), one.chunks):
                steps = step * factors[3 * layer // layers]
                k, k_bits = entropy(steps)(one.k[layer, chunk])
                v, v_bits = entropy(wider * steps)(one.v[layer, chunk])
                one.model.write_kv(layer, torch.arange(chunk.start, chunk.stop), k, v)
                bits.append((k_bits + v_bits) / 2)
            kl = float((want.exp() * (want - first_token(one))).sum())
            found.setdefault(f"{name}, K {step}, V {wider * step}", []).append((kl, sum(bits) / len(bits)))
        restore(one)
    for name, values in found.items():
        kl = torch.tensor([x for x, _ in values])
        print(json.dumps({"steps": name, "KL mean": float(f"{kl.mean():.2g}"), "median": float(f"{kl.median():.2g}"),
                          "bits": round(sum(b for _, b in values) / len(values), 2), "n": len(values)}))  # fmt: skip


def restore(one: Prefilled) -> None:
    for layer in range(one.k.shape[0]):
        one.model.write_kv(layer, torch.arange(one.context), one.k[layer], one.v[layer])


def first_token(one: Prefilled) -> Tensor:
    """Log-probabilities of the first answer token, the question computed on what the cache holds."""
    hidden = walk(one.model, one.ids, torch.arange(one.context, len(one.ids)))
    return one.model.logits(hidden[-1:])[0].double().log_softmax(-1)


def coders(args: argparse.Namespace) -> None:
    codes = (torch.randn(256, 1024) / 0.25).round().clamp(-127, 127).add(128).to(torch.uint8).numpy()
    for level in (1, 3, 9):
        coded = zstandard.ZstdCompressor(level=level, write_content_size=False).compress(codes.data)
        report(f"zstd {level}", len(coded), codes.size, lambda coded=coded: zstandard.ZstdDecompressor().decompress(
            coded, max_output_size=codes.size))  # fmt: skip
    try:
        import constriction
    except ImportError:
        print("rANS: constriction is not installed")
        return
    symbols = codes.reshape(-1).astype("int32")
    counts = torch.bincount(torch.from_numpy(symbols), minlength=256).numpy() + 0.5
    model = constriction.stream.model.Categorical((counts / counts.sum()).astype("float32"), perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols, model)
    words = coder.get_compressed()
    report("rANS", 4 * len(words), codes.size,
           lambda: constriction.stream.stack.AnsCoder(words).decode(model, len(symbols)))  # fmt: skip


def report(name: str, size: int, codes: int, decode: Callable[[], Any]) -> None:
    best = min(timed(decode) for _ in range(30))
    print(json.dumps({"coder": name, "bits": round(8 * size / codes, 3), "codes_per_s": f"{codes / best:.2e}"}))


def timed(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = {"anchors": anchors, "error": error, "depth": depth, "coders": coders}
    parser.add_argument("what", choices=list(studies))
    parser.add_argument("--model", type=Path, default=HERE / "models" / "demo")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=8_000_000, help="offset into the evaluation seeds")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    studies[args.what](args)


if __name__ == "__main__":
    main()
