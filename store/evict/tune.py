"""Which policy suits the traffic: each is run in miniature (Waldspurger, Saemundson, Ahmad, Park; USENIX ATC 2017)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from store.evict.choose import choose
from store.evict.gdsf import Gdsf
from store.evict.types import Item, Policy, Reason, Rules, Usage
from store.types import KVKey

# From LRU to all but LFU; of those that save about the same, the first one is taken.
CANDIDATES: tuple[Gdsf, ...] = (
    Gdsf(decay=0.5, recent=1.0),
    Gdsf(decay=0.8, recent=0.95),
    Gdsf(decay=0.8, recent=0.5),
    Gdsf(decay=0.5, recent=0.2),
    Gdsf(decay=0.2, recent=0.05),
)

_MOST = 1024  # entries of a miniature; beyond it the sample is halved
_ROUND = 500  # uses in the sample between two decisions
_FADE = 0.9  # what a round counts for at the next decision
_ALIKE = 1.01  # what differs by less may be chance: no reason to change, nor to go further from LRU than needed


class _Miniature:
    """A cache of one policy over the sampled keys: who is in it, and what it saved."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.held: set[KVKey] = set()
        self.bytes = 0
        self.saved = 0.0

    def ask(self, item: Item, seen: Mapping[KVKey, Item], rules: Rules, now: float) -> None:
        """``item`` was asked for; ``seen``: the sampled keys."""
        if item.key in self.held:
            self.saved += item.cost
            return
        if item.bytes > rules.limit:
            return
        if self.bytes + item.bytes > rules.limit:
            held = (seen[key] for key in self.held)
            self.drop(choose(held, rules, self.policy, need=item.bytes, now=now, clock=0.0).victims, seen)
        self.held.add(item.key)
        self.bytes += item.bytes

    def drop(self, victims: Iterable[tuple[KVKey, Reason]], seen: Mapping[KVKey, Item]) -> None:
        for key, _ in victims:
            self.held.remove(key)
            self.bytes -= seen[key].bytes


class Tuner:
    """``policy``: the candidate that would have saved most lately in a cache of ``limit`` bytes.

    Candidates must keep the same ``Usage``: they change places at any time. A call takes 0.1 ms in a small cache where
    most are missing, 2 microseconds in one of 20,000 entries. Not thread-safe.
    """

    def __init__(self, limit: int, *, low: float = 0.9, candidates: Sequence[Policy] = CANDIDATES) -> None:
        self._rules = Rules(limit, low)
        self._miniatures = [_Miniature(policy) for policy in candidates]
        self._best = self._miniatures[0]
        self._seen: dict[KVKey, Item] = {}
        self._below = 1 << 32  # keys whose first four bytes are below it are sampled
        self._asked = 0

    @property
    def policy(self) -> Policy:
        return self._best.policy

    def asked(self, key: KVKey, bytes: int, cost: float, *, now: float) -> None:
        """``key`` was asked for. Of one that was missing: to be called when it has come, and its size is known."""
        if not self._samples(key):
            return
        known = self._seen.get(key)
        before = known.usage if known else Usage(0.0, now, now)
        if known is None or known.bytes == bytes:  # an entry that was written anew in another codec is a new one here
            usage = self.policy.used(before, bytes, cost, now=now, clock=0.0)
            item = Item(key, bytes, cost, usage)
        else:
            item = replace(known, usage=self.policy.used(before, bytes, cost, now=now, clock=0.0))
        self._seen[key] = item
        for miniature in self._miniatures:
            miniature.ask(item, self._seen, self._rules, now)
        self._asked += 1
        if self._asked % _ROUND == 0:
            self._decide()

    def _samples(self, key: KVKey) -> bool:
        return int.from_bytes(key.digest[:4], "big") < self._below

    def _decide(self) -> None:
        enough = max(miniature.saved for miniature in self._miniatures) / _ALIKE
        if self._best.saved < enough:
            self._best = next(miniature for miniature in self._miniatures if miniature.saved >= enough)
        for miniature in self._miniatures:
            miniature.saved *= _FADE
        if max(len(miniature.held) for miniature in self._miniatures) > _MOST:
            self._halve()
        if len(self._seen) > 8 * _MOST:
            held = set().union(*(miniature.held for miniature in self._miniatures))
            stay = heapq.nlargest(4 * _MOST, self._seen.values(), key=lambda item: item.usage.last)
            self._seen = {key: self._seen[key] for key in held} | {item.key: item for item in stay}

    def _halve(self) -> None:
        """Half of the keys in half of the room: the same cache, seen with a coarser eye."""
        self._below //= 2
        self._rules = replace(self._rules, limit=max(1, self._rules.limit // 2))
        for miniature in self._miniatures:
            # What is too much for half of the room goes with the next newcomer.
            miniature.drop([(key, "capacity") for key in miniature.held if not self._samples(key)], self._seen)
        self._seen = {key: item for key, item in self._seen.items() if self._samples(key)}
