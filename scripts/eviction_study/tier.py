"""A tier that holds nothing but its bookkeeping: what it evicts and refuses is decided by ``store.evict``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from scripts.eviction_study.trace import Access, Trace
from store.evict import Door, Item, Misses, Policy, Rules, Tuner, choose
from store.types import KVKey


@dataclass
class Score:
    """Seconds ``saved_s`` of ``most_s``, those that a store which has everything would save. ``written`` in bytes."""

    asked: int = 0
    hits: int = 0
    saved_s: float = 0.0
    most_s: float = 0.0
    written: int = 0
    evicted: int = 0
    refused: int = 0
    saved_by_owner: dict[str, float] = field(default_factory=dict)

    def ask(self, owner: str, saved_s: float, hit: bool) -> None:
        self.asked += 1
        self.most_s += saved_s
        if hit:
            self.hits += 1
            self.saved_s += saved_s
            self.saved_by_owner[owner] = self.saved_by_owner.get(owner, 0.0) + saved_s


class Tier:
    """Read-through: what is asked for and missing is compiled and put, as the store's tiers see it."""

    def __init__(self, trace: Trace, rules: Rules, policy: Policy, *, tuned: bool, admission: bool) -> None:
        self.chunks = trace.chunks
        self.keys = [KVKey(hashlib.sha256(i.to_bytes(8, "little")).digest()) for i in range(len(trace.chunks))]
        self.rules = rules
        self.policy = policy
        self.tuner = Tuner(rules.limit, low=rules.low) if tuned else None
        self.door = Door() if admission else None
        self.misses = Misses(policy)
        self.held: dict[KVKey, Item] = {}
        self.bytes = 0
        self.clock = 0.0
        self.score = Score()

    def access(self, access: Access) -> None:
        chunk, key, now = self.chunks[access.chunk], self.keys[access.chunk], access.time
        item = self.held.get(key)
        if access.asked:
            self.score.ask(chunk.owner, chunk.saved_s, item is not None)
            if self.tuner is not None:
                self.tuner.asked(key, chunk.bytes, chunk.saved_s, now=now)
                self.policy = self.tuner.policy
            if item is None:
                self.misses.note(key, now=now)
            else:
                usage = self.policy.used(item.usage, item.bytes, item.cost, now=now, clock=self.clock)
                self.held[key] = Item(key, item.bytes, item.cost, usage, item.owner)
        if item is None:
            before = self.misses.get(key)
            usage = self.policy.entered(chunk.bytes, chunk.saved_s, now=now, clock=self.clock, before=before)
            self._put(Item(key, chunk.bytes, chunk.saved_s, usage, chunk.owner), now)

    def _put(self, item: Item, now: float) -> None:
        if self.bytes + item.bytes > self.rules.limit and not self._make_room(item, now):
            self.score.refused += 1
            return
        self.misses.take(item.key)
        self.held[item.key] = item
        self.bytes += item.bytes
        self.score.written += item.bytes

    def _make_room(self, item: Item, now: float) -> bool:
        if self.door is not None and self.door.refuses(self.policy, item, now=now):
            return False
        choice = choose(
            self.held.values(),
            self.rules,
            self.policy,
            need=item.bytes,
            now=now,
            clock=self.clock,
            owner=item.owner,
        )
        displaced = [self.held[key] for key, reason in choice.victims if reason == "capacity"]
        if not choice.enough or (self.door is not None and not self.door.admits(self.policy, item, displaced, now=now)):
            return False
        self.clock = choice.clock
        for key, _ in choice.victims:
            gone = self.held.pop(key)
            self.misses.keep(key, gone.usage)
            self.bytes -= gone.bytes
            self.score.evicted += 1
        return True


def replay(
    trace: Trace,
    policy: Policy,
    capacity: int,
    *,
    tuned: bool = False,
    admission: bool = False,
    low: float = 0.9,
    ttl_s: float | None = None,
) -> Score:
    """``tuned``: the policy is what a ``Tuner`` says (``policy`` begins)."""
    tier = Tier(trace, Rules(capacity, low, trace.shares, ttl_s), policy, tuned=tuned, admission=admission)
    for access in trace.accesses:
        tier.access(access)
    return tier.score
