"""Streams of requests for chunks: made with a seed, or over what our retriever was recorded to find."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scripts.eviction_study.cost import CostModel

K = 6  # chunks per request: the service's default max_num_results
RECORDED = Path(__file__).resolve().parent.parent / "traces" / "musique_dev.json"

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Found = Sequence[int] | Ints  # chunks of one request


@dataclass(frozen=True)
class Chunk:
    """``saved_s``: seconds that a hit saves."""

    tokens: int
    bytes: int
    saved_s: float
    owner: str = "default"


@dataclass(frozen=True)
class Access:
    """At ``time`` seconds chunk number ``chunk`` was asked for, or (``asked`` False) put by a bulk precompute."""

    time: float
    chunk: int
    asked: bool = True


@dataclass(frozen=True)
class Trace:
    name: str
    chunks: tuple[Chunk, ...]
    accesses: tuple[Access, ...]
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def footprint(self) -> int:
        """Bytes of all chunks that occur: a store of this size evicts nothing."""
        return sum(self.chunks[i].bytes for i in {access.chunk for access in self.accesses})


def _weights(n: int, exponent: float) -> Floats:
    weights = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    total: float = weights.sum()
    return weights / total


def _ask(times: Floats, requests: Sequence[Found]) -> list[Access]:
    return [Access(float(t), int(i)) for t, found in zip(times, requests, strict=True) for i in found]


def _poisson(rng: np.random.Generator, n: int, rate: float) -> Floats:
    return np.cumsum(rng.exponential(1 / rate, n))


def _equal(cost: CostModel, n: int, tokens: int = 512) -> tuple[Chunk, ...]:
    size = cost.stored_bytes(tokens)
    return tuple(Chunk(tokens, size, cost.saved_s(tokens, size)) for _ in range(n))


def _mixed(rng: np.random.Generator, cost: CostModel, n: int, owner: str = "default") -> list[Chunk]:
    """48 to 2,048 tokens, even in the logarithm; raw, 8-bit or 4-bit."""
    chunks = []
    for tokens, ratio in zip(
        np.exp(rng.uniform(np.log(48), np.log(2048), n)), rng.choice([1.0, 1.9, 3.6], n), strict=True
    ):
        size = cost.stored_bytes(int(tokens), ratio)
        chunks.append(Chunk(int(tokens), size, cost.saved_s(int(tokens), size), owner))
    return chunks


def _draw(rng: np.random.Generator, order: Ints, weights: Floats, requests: int) -> list[Found]:
    """Each request K different chunks, one after the other; the rank of popularity r is chunk ``order[r]``."""
    upto = np.cumsum(weights)
    found: list[Found] = []
    for ranks in np.searchsorted(upto / upto[-1], rng.random((requests, 8 * K)), side="right"):
        # What comes again is drawn anew: the next of the row, in the end as many as it takes.
        different = dict.fromkeys(ranks.tolist())
        while len(different) < K:
            different[int(rng.choice(len(order), p=weights))] = None
        found.append(order[list(different)[:K]])
    return found


def zipf(rng: np.random.Generator, cost: CostModel, exponent: float) -> Trace:
    """Independent requests, popularity fixed."""
    n, requests = 3000, 6000
    found = _draw(rng, rng.permutation(n), _weights(n, exponent), requests)
    return Trace(f"zipf {exponent}", _equal(cost, n), tuple(_ask(_poisson(rng, requests, 1.0), found)))


def drift(rng: np.random.Generator, cost: CostModel) -> Trace:
    """Zipf 1.0; every 200 requests a tenth of the chunks change places at random: half of them in 1,300 requests."""
    n, requests, every = 3000, 6000, 200
    order, weights = rng.permutation(n), _weights(n, 1.0)
    found: list[Found] = []
    for _ in range(0, requests, every):
        found += _draw(rng, order, weights, every)
        moved = rng.choice(n, n // 10, replace=False)
        order[moved] = order[rng.permutation(moved)]
    return Trace("drift", _equal(cost, n), tuple(_ask(_poisson(rng, requests, 1.0), found)))


def news(rng: np.random.Generator, cost: CostModel) -> Trace:
    """Every 3 requests a chunk is born, much asked for at first (Pareto) and half as much every 300 requests."""
    requests, every, half = 6000, 3, 300
    n = requests // every
    fame = rng.pareto(1.2, n) + 0.1
    found: list[Found] = []
    for request in range(requests):
        born = np.arange(max(0, request // every - 20 * half // every), request // every + K)
        born = born[born < n]
        weights = fame[born] * np.exp2(-np.maximum(0, request - born * every) / half)
        found.append(rng.choice(born, K, replace=False, p=weights / weights.sum()))
    return Trace("news", _equal(cost, n), tuple(_ask(_poisson(rng, requests, 1.0), found)))


def scans(rng: np.random.Generator, cost: CostModel) -> Trace:
    """Zipf 0.9; every 1,000 requests a batch job asks for 1,500 chunks in a row that nobody asks for otherwise."""
    n, requests, every, length = 2000, 6000, 1000, 1500
    times = _poisson(rng, requests, 1.0)
    found = _draw(rng, rng.permutation(n), _weights(n, 0.9), requests)
    accesses: list[Access] = []
    cold = n
    for start in range(0, requests, every):
        accesses += _ask(times[start : start + every], found[start : start + every])
        accesses += [Access(accesses[-1].time + 0.01 * i, cold + i) for i in range(length)]
        cold += length
    accesses.sort(key=lambda access: access.time)
    return Trace("scans", _equal(cost, cold), tuple(accesses))


def bulk(rng: np.random.Generator, cost: CostModel) -> Trace:
    """Zipf 0.9 over the first 2,000 chunks; every 1,000 requests 1,500 more are precomputed, one in fifty of which is
    asked for later, five times on the average."""
    n, requests, every, length = 2000, 6000, 1000, 1500
    times = _poisson(rng, requests, 1.0)
    accesses = _ask(times, _draw(rng, rng.permutation(n), _weights(n, 0.9), requests))
    cold = n
    for start in range(every, requests, every):
        begin = float(times[start])
        accesses += [Access(begin + 0.01 * i, cold + i, asked=False) for i in range(length)]
        for i in rng.choice(length, length // 50, replace=False):
            later = begin + 30 + np.cumsum(rng.exponential(200, rng.poisson(5)))
            accesses += [Access(float(t), cold + int(i)) for t in later]
        cold += length
    accesses.sort(key=lambda access: access.time)
    return Trace("bulk precompute", _equal(cost, cold), tuple(accesses))


def _sessions(
    rng: np.random.Generator, topics: int, sessions: int, weights: Floats, ask: Callable[[int], Found]
) -> list[Access]:
    """Sessions begin as a Poisson process, every 8 s; each keeps to one topic for 3 to 12 requests, 20 s apart."""
    accesses: list[Access] = []
    for begin in _poisson(rng, sessions, 1 / 8):
        topic = int(rng.choice(topics, p=weights))
        for t in begin + np.cumsum(rng.exponential(20, int(rng.integers(3, 13)))):
            accesses += [Access(float(t), int(i)) for i in ask(topic)]
    return sorted(accesses, key=lambda access: access.time)


def sessions(rng: np.random.Generator, cost: CostModel) -> Trace:
    """400 topics of 10 chunks, Zipf 0.8; each request of a session finds 6 of its topic's 10."""
    topics = 400
    accesses = _sessions(
        rng, topics, 800, _weights(topics, 0.8), lambda topic: 10 * topic + rng.choice(10, K, replace=False)
    )
    return Trace("sessions", _equal(cost, 10 * topics), tuple(accesses))


def mixed(rng: np.random.Generator, cost: CostModel) -> Trace:
    """Zipf 0.9; sizes from 48 to 2,048 tokens, stored raw, in 8 bits or in 4: size and worth of a byte differ."""
    n, requests = 3000, 6000
    found = _draw(rng, rng.permutation(n), _weights(n, 0.9), requests)
    return Trace("mixed sizes", tuple(_mixed(rng, cost, n)), tuple(_ask(_poisson(rng, requests, 1.0), found)))


def owners(rng: np.random.Generator, cost: CostModel) -> Trace:
    """A loud owner (90 % of the requests, Zipf 0.7 over 3,000) and a quiet one (Zipf 1.0 over 1,000), half each."""
    requests = 6000
    chunks = _mixed(rng, cost, 3000, "loud") + _mixed(rng, cost, 1000, "quiet")
    quiet = rng.random(requests) < 0.1
    loud_found = _draw(rng, rng.permutation(3000), _weights(3000, 0.7), requests)
    quiet_found = _draw(rng, 3000 + rng.permutation(1000), _weights(1000, 1.0), requests)
    found = [quiet_found[i] if quiet[i] else loud_found[i] for i in range(requests)]
    accesses = tuple(_ask(_poisson(rng, requests, 1.0), found))
    return Trace("two owners", tuple(chunks), accesses, {"loud": 0.5, "quiet": 0.5})


def recorded(rng: np.random.Generator, cost: CostModel, pattern: str) -> Trace:
    """What our retriever found for the 100 questions of ``musique_dev.json``, the questions drawn Zipf 0.9
    (``zipf``), evenly (``even``), or in sessions that ask three questions over and over (``sessions``)."""
    data = json.loads(RECORDED.read_text())
    tokens: list[int] = data["tokens"]
    questions: list[list[int]] = [found[:K] for found in data["questions"]]
    chunks = []
    for count in tokens:
        size = cost.stored_bytes(count)
        chunks.append(Chunk(count, size, cost.saved_s(count, size)))
    order, weights = rng.permutation(len(questions)), _weights(len(questions), 0.9)
    if pattern == "sessions":
        neighbours = [np.roll(order, -int(i))[:3] for i in np.argsort(order)]
        accesses = _sessions(
            rng, len(questions), 800, weights[np.argsort(order)], lambda topic: questions[rng.choice(neighbours[topic])]
        )
    else:
        drawn = rng.choice(order, 5000, p=weights if pattern == "zipf" else None)
        accesses = _ask(_poisson(rng, 5000, 1.0), [questions[i] for i in drawn])
    return Trace(f"musique {pattern}", tuple(chunks), tuple(accesses))


_MAKERS: dict[str, Callable[[np.random.Generator, CostModel], Trace]] = {
    "zipf 0.6": partial(zipf, exponent=0.6),
    "zipf 0.8": partial(zipf, exponent=0.8),
    "zipf 1.0": partial(zipf, exponent=1.0),
    "zipf 1.2": partial(zipf, exponent=1.2),
    "drift": drift,
    "news": news,
    "scans": scans,
    "bulk precompute": bulk,
    "sessions": sessions,
    "mixed sizes": mixed,
    "two owners": owners,
    "musique zipf": partial(recorded, pattern="zipf"),
    "musique even": partial(recorded, pattern="even"),
    "musique sessions": partial(recorded, pattern="sessions"),
}
NAMES = tuple(_MAKERS)


def make_trace(name: str, seed: int, cost: CostModel) -> Trace:
    """One of ``NAMES``. Each has random numbers of its own, so that one can change without the others."""
    return _MAKERS[name](np.random.default_rng([seed, NAMES.index(name)]), cost)
