"""What each codec costs in answers, and what it saves in bytes and takes in time: the table of docs/codecs.md.

Every chunk is compiled once and stored in every codec; then each arm answers the same question from each codec's KV
(`app.evaluate`, transformers engine, demo model). A codec's loss is the paired difference of its answers' scores to
those from raw KV, in points, with a bootstrap interval; agreement is the share of answers that are raw's token by
token. Results are appended to --out question by question, and a second run goes on.

    quality  ask and append            table  print the table of the results so far            speed  sizes and rates
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from app.bench.workbench import load_tokenizer, throwaway_engine
from app.demo.world import TASKS
from app.evaluate.asker import Asker
from app.evaluate.measures import mean_and_interval
from app.evaluate.plan import FULL, Plan, make_arms
from app.settings import Settings
from store.base import Entry, Found, GcReport, KVStore, Miss, StoreStats, VerifyReport
from store.codec import CODECS
from store.config import StoreConfig
from store.entry import encode
from store.memory import MemoryStore
from store.types import ChunkKV, KVKey, Want

HERE = Path(__file__).resolve().parent.parent


class Shelves(KVStore):
    """One memory store for each codec: everything is put into all, and found in the one called ``now``."""

    tier = "ram"

    def __init__(self, codecs: Iterable[str]) -> None:
        self.stores = {name: MemoryStore(StoreConfig(codec=name)) for name in codecs}
        self.now = next(iter(self.stores))

    @property
    def _store(self) -> MemoryStore:
        return self.stores[self.now]

    def find(self, want: Want) -> Found | Miss:
        return self._store.find(want)

    def contains(self, key: KVKey) -> bool:
        return self._store.contains(key)

    def put_many(self, chunks: list[ChunkKV]) -> list[int]:
        written = [store.put_many(chunks) for store in self.stores.values()]
        return written[0]

    def delete(self, key: KVKey, *, evicted: bool = False) -> bool:
        gone = [store.delete(key, evicted=evicted) for store in self.stores.values()]
        return all(gone)

    def pin(self, keys: Iterable[KVKey], *, pinned: bool = True) -> int:
        return self._store.pin(keys, pinned=pinned)

    def prefetch(self, keys: Iterable[KVKey]) -> int:
        return self._store.prefetch(keys)

    def warm(self, keys: Iterable[KVKey]) -> int:
        return self._store.warm(keys)

    def cool(self, keys: Iterable[KVKey]) -> int:
        return self._store.cool(keys)

    def entries(self) -> Iterator[Entry]:
        return self._store.entries()

    def entry(self, key: KVKey) -> Entry | None:
        return self._store.entry(key)

    def stats(self) -> StoreStats:
        return self._store.stats()

    def verify(self, *, repair: bool = False) -> VerifyReport:
        return self._store.verify(repair=repair)

    def gc(self, *, full: bool = False) -> GcReport:
        return self._store.gc(full=full)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        for store in self.stores.values():
            store.close()


def plan_of(args: argparse.Namespace) -> Plan:
    arms = make_arms(["auto"], [args.ratio])
    return Plan(
        arms,
        seed=args.seed,
        questions=args.questions,
        documents=args.documents,
        compile=("document", "prefix"),
        tasks=tuple(args.task),
        first=args.first,
    )


async def quality(args: argparse.Namespace) -> None:
    """Ask what ``args.out`` does not hold yet, and append it there."""
    settings = Settings(model=str(args.model), engine="transformers", dtype="float32", device="cpu")
    plan = plan_of(args)
    done = {(r["task"], r["index"], codec) for r in read(args.out) for codec in r["codecs"]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    async with throwaway_engine(settings, in_memory=True) as opened:
        engine: Any = opened
        engine.store.close()
        engine.store = shelves = Shelves(dict.fromkeys(["raw", *args.codec]))
        asker = Asker(engine, load_tokenizer(settings.model), plan)
        with args.out.open("a", encoding="utf-8") as file:
            for index in plan.indices:
                for task in plan.tasks:
                    todo = [c for c in args.codec if (task, index, c) not in done]
                    if todo:
                        record = await ask(asker, shelves, task, index, todo)
                        file.write(json.dumps(record) + "\n")
                        file.flush()
                asker.forget()
                print(f"{time.strftime('%H:%M:%S')} question {index} of {plan.indices.stop}", flush=True)


async def ask(asker: Asker, shelves: Shelves, task: str, index: int, codecs: list[str]) -> dict[str, Any]:
    """Every arm's answer from raw KV and from that of each codec, judged against raw's; and full prefill's."""
    plan, item = asker.plan, asker.plan.source.item(task, index)
    full = next(trial for trial in plan.trials if trial.compile is None)
    record: dict[str, Any] = {"task": task, "index": index, "codecs": {name: {} for name in codecs}}
    shelves.now = "raw"
    record["full"] = (await asker.ask(item, task, index, [full], None))["trials"][FULL]
    for trial in plan.trials:
        # Reuse of chunks compiled alone answers little at all: nothing to lose there.
        if trial.compile is None or trial.key == "prefix reuse":
            continue
        shelves.now = "raw"
        raw = await asker.ask(item, task, index, [trial], None)  # nothing known: it counts as the answer to agree with
        known = {"trials": {FULL: raw["trials"][trial.key]}, "first": raw["first"]}
        for shelves.now in codecs:
            said = raw if shelves.now == "raw" else await asker.ask(item, task, index, [trial], known)
            record["codecs"][shelves.now][trial.key] = said["trials"][trial.key]
    return record


def read(path: Path) -> list[dict[str, Any]]:
    """Results, one record for each question; a line that was cut short by a kill is dropped."""
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []:
        if not line.endswith("}"):
            continue
        record = json.loads(line)
        known = records.setdefault((record["task"], record["index"]), record)
        known["codecs"] |= record["codecs"]
    return list(records.values())


def table(records: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """By codec and arm, over the questions that it answered: ``lost``, the paired difference of raw's score to its own
    in points; the share of answers equal to raw's, in percent; mean KL(raw || codec) of the first token in nats; and
    ``bound``: the most that the first answer token's probabilities can differ by (Pinsker), its mean in points."""
    rows = []
    arms = list(dict.fromkeys(arm for r in records for trials in r["codecs"].values() for arm in trials))
    for codec in dict.fromkeys(name for r in records for name in r["codecs"]):
        asked = [r["codecs"] for r in records if codec in r["codecs"] and "raw" in r["codecs"]]
        for arm in [*arms, "all"] if asked else []:
            named = arms if arm == "all" else [arm]
            # One value for each question: its arms are not independent of one another.
            score = [[100 * r[codec][a]["scores"][metric] for a in named] for r in asked]
            lost = [
                [100 * (r["raw"][a]["scores"][metric] - r[codec][a]["scores"][metric]) for a in named] for r in asked
            ]
            agree = [r[codec][a]["ids"] == r["raw"][a]["ids"] for r in asked for a in named]
            kl = [r[codec][a]["kl_first"] for r in asked for a in named if codec != "raw"] or [0.0]
            mean, interval = mean_and_interval([float(np.mean(x)) for x in lost])
            rows.append({
                "codec": codec, "arm": arm, "n": len(asked), "score": round(float(np.mean(score)), 2),
                "lost": round(mean, 2), "ci95": [round(x, 2) for x in interval],
                "agreement": round(100 * float(np.mean(agree)), 2), "kl_first": float(f"{np.mean(kl):.2g}"),
                "bound": round(100 * float(np.mean(np.sqrt(np.asarray(kl) / 2))), 3),
            })  # fmt: skip
    full = [100 * r["full"]["scores"][metric] for r in records]
    return [{"codec": "-", "arm": "full", "n": len(full), "score": round(float(np.mean(full)), 2)}, *rows]


def size(chunks: list[ChunkKV], codec: str) -> tuple[int, int, int]:
    """Bytes of ``chunks``' planes, of their headers, and how many values of K and V they hold."""
    planes = headers = values = 0
    for chunk in chunks:
        header, made = encode(chunk, CODECS[codec])
        planes, headers = planes + sum(len(plane) for plane in made), headers + len(header)
        values += chunk.k.numel() + chunk.v.numel()
    return planes, headers, values


def rates(k: torch.Tensor, v: torch.Tensor, codec: str, seconds: float) -> tuple[float, float]:
    """GB/s of raw bytes that one plane is encoded and decoded at on one core: the best of what fits in ``seconds``."""
    made, out, best = CODECS[codec], (torch.empty_like(k), torch.empty_like(v)), [9.0, 9.0]
    plane, until = made.encode(k, v, depth=0.5), time.perf_counter() + seconds
    while time.perf_counter() < until:
        begin = time.perf_counter()
        made.encode(k, v, depth=0.5)
        between = time.perf_counter()
        for _ in range(5):
            start = time.perf_counter()
            made.decode(plane, *out)
            best[1] = min(best[1], time.perf_counter() - start)
        best[0] = min(best[0], between - begin)
    raw = 2 * k.numel() * k.itemsize / 1e9
    return raw / best[0], raw / best[1]


@torch.inference_mode()
def speed(args: argparse.Namespace) -> None:
    """Sizes on the demo model's own KV, rates on its planes and on those of a layer of 8 heads of 128 in bfloat16."""
    torch.set_num_threads(1)
    chunks = asyncio.run(compiled(args))
    one = max(chunks, key=lambda chunk: len(chunk.token_ids))
    shape = (256, 8, 128)
    # As keys and values are: offsets by channel, and channels of different width.
    offset, width = torch.randn(2, 1, *shape[1:]).unbind(0)
    large = (torch.randn(2, *shape) * (0.3 + width.abs()) + 2 * offset).to(torch.bfloat16)
    print(f"{len(chunks)} chunks, {sum(len(c.token_ids) for c in chunks)} tokens, "
          f"planes of {one.k[0].nbytes + one.v[0].nbytes} and {large.nbytes} bytes")  # fmt: skip
    for name in args.codec:
        planes, headers, values = size(chunks, name)
        bits, with_headers = 8 * planes / values, 8 * (planes + headers) / values
        small_rate, rate = rates(one.k[1], one.v[1], name, args.seconds), rates(large[0], large[1], name, args.seconds)
        print(json.dumps({
            "codec": name, "bits_per_value": round(bits, 3), "with_headers": round(with_headers, 3),
            "smaller_than_bf16": round(16 / with_headers, 2),
            "encode_gbps": [round(x[0], 2) for x in (small_rate, rate)],
            "decode_gbps": [round(x[1], 2) for x in (small_rate, rate)],
        }), flush=True)  # fmt: skip


async def compiled(args: argparse.Namespace) -> list[ChunkKV]:
    """The chunks of some questions, compiled behind their documents and alone."""
    settings = Settings(model=str(args.model), engine="transformers", dtype="float32", device="cpu")
    plan, chunks = plan_of(args), list[ChunkKV]()

    class Keeping(MemoryStore):
        def put_many(self, put: list[ChunkKV]) -> list[int]:
            chunks.extend(chunk for chunk in put if not self.contains(chunk.key))
            return super().put_many(put)

    async with throwaway_engine(settings, in_memory=True) as opened:
        engine: Any = opened
        engine.store.close()
        engine.store = Keeping(StoreConfig())
        asker = Asker(engine, load_tokenizer(settings.model), plan)
        for index in plan.indices:
            reuse = [t for t in plan.trials if t.key.endswith("reuse") or t.compile is None]
            await asker.ask(plan.source.item(plan.tasks[0], index), plan.tasks[0], index, reuse, None)
    return chunks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "table", "speed"])
    parser.add_argument("--model", type=Path, default=HERE / "models" / "demo")
    parser.add_argument("--codec", nargs="+", default=list(CODECS), choices=list(CODECS))
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--questions", type=int, default=100, help="per task")
    parser.add_argument("--first", type=int, default=0, help="number of the first question")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each rate")
    parser.add_argument("--out", type=Path, nargs="+", default=[Path("codecs.jsonl")])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "quality":
        (args.out,) = args.out
        asyncio.run(quality(args))
    elif args.what == "speed":
        speed(args)
    else:
        for row in table([record for path in args.out for record in read(path)], "accuracy"):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
