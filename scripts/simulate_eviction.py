"""Replay request traces through the store's own eviction: how many seconds each policy saves.

    python scripts/simulate_eviction.py [--json] [--seed 7] [--capacities 0.05 0.1 0.3] [--traces NAME ...]

Policies, best last: ``lru``; ``clock``, GDSF as published; ``fixed``, our gdsf untuned; ``ours``, with ``Tuner`` and
admission, what the tiers run. ``belady`` knows the future (size-aware, a heuristic where sizes differ), ``bound`` is
what nobody can exceed. A capacity is a part of the bytes of all chunks of the trace. Exit status 1 if ``ours`` saves
less than ``lru`` anywhere. Without --json, a table: saved seconds in percent of what an unbounded store saves.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.eviction_study.bound import belady, upper_bound
from scripts.eviction_study.classic import ClassicGdsf
from scripts.eviction_study.cost import CostModel
from scripts.eviction_study.tier import Score, replay
from scripts.eviction_study.trace import NAMES, make_trace
from store.evict import Gdsf, Lru

POLICIES = ("lru", "clock", "fixed", "ours", "belady")


@dataclass(frozen=True)
class Row:
    """One trace at one capacity; ``bound`` in seconds like ``Score.saved_s``."""

    trace: str
    capacity: float
    scores: dict[str, Score]
    bound: float

    @property
    def most(self) -> float:
        return self.scores["lru"].most_s

    @property
    def gain(self) -> float:
        """Of ours over LRU, in saved seconds: 0.1 is a tenth more."""
        return self.scores["ours"].saved_s / self.scores["lru"].saved_s - 1.0


def simulate(name: str, capacity: float, seed: int, cost: CostModel, low: float) -> Row:
    trace = make_trace(name, seed, cost)
    limit = int(capacity * trace.footprint)
    scores = {
        "lru": replay(trace, Lru(), limit, low=low),
        "clock": replay(trace, ClassicGdsf(), limit, low=low),
        "fixed": replay(trace, Gdsf(), limit, low=low),
        "ours": replay(trace, Gdsf(), limit, tuned=True, admission=True, low=low),
        "belady": belady(trace, limit),
    }
    return Row(name, capacity, scores, upper_bound(trace, limit))


def table(rows: list[Row]) -> str:
    lines = [
        "| trace | room | lru | clock | fixed | **ours** | belady | bound | ours/lru | hits lru | ours | written |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        saved = {name: f"{100 * row.scores[name].saved_s / row.most:.1f}" for name in POLICIES}
        lru, ours = row.scores["lru"], row.scores["ours"]
        lines.append(
            f"| {row.trace} | {row.capacity:.0%} | {saved['lru']} | {saved['clock']} | {saved['fixed']} | "
            f"**{saved['ours']}** | {saved['belady']} | {100 * row.bound / row.most:.1f} | {row.gain:+.1%} | "
            f"{lru.hits / lru.asked:.3f} | {ours.hits / ours.asked:.3f} | {ours.written / lru.written - 1:+.0%} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--capacities", type=float, nargs="+", default=[0.05, 0.1, 0.3], metavar="PART")
    parser.add_argument(
        "--traces", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=", ".join(NAMES)
    )
    parser.add_argument("--low", type=float, default=0.9, help="low watermark, part of the capacity")
    parser.add_argument("--compute", type=float, default=CostModel.compute, help="FLOP/s of prefill")
    parser.add_argument("--bandwidth", type=float, default=CostModel.bandwidth, help="bytes/s of a load")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="every figure of every run, instead of the table")
    options = parser.parse_args()
    if not all(0.0 < capacity <= 1.0 for capacity in options.capacities):
        parser.error(f"a capacity must be within 0..1, not {options.capacities}")
    cost = CostModel(compute=options.compute, bandwidth=options.bandwidth)
    runs = [
        (name, capacity, options.seed, cost, options.low) for name in options.traces for capacity in options.capacities
    ]
    if options.jobs == 1:
        rows = [simulate(*run) for run in runs]
    else:
        with ProcessPoolExecutor(options.jobs) as pool:
            rows = list(pool.map(simulate, *zip(*runs, strict=True)))
    worse = [f"{row.trace} at {row.capacity:.0%} ({row.gain:+.2%})" for row in rows if row.gain < 0]
    if options.json:
        print(json.dumps({"seed": options.seed, "cost": asdict(cost), "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        print(table(rows))
        print(f"\nours saves less than lru: {', '.join(worse) or 'nowhere'}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
