"""A bounded set of entries in memory: who is in it, who goes when it is full."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from store.config import StoreConfig
from store.entry import Header
from store.errors import StoreFullError
from store.evict import Door, Item, Misses, Policy, Reason, Rules, Tuner, choose, open_policy
from store.held import Held
from store.types import KVKey

# Choosing victims looks at every entry: it looks for those of the next tenth of the limit at once.
AHEAD = 0.9


@dataclass(eq=False)
class Life:
    """What is known of a held entry beside its bytes; ``created`` in seconds since the epoch."""

    item: Item
    created: float


class Ram:
    """Held entries up to ``config.max_bytes`` of payload (None: no limit), evicted by ``config.policy``.

    Thread-safe; several calls are one step under ``lock``, which is re-entrant. ``counters`` as in ``StoreStats``.
    """

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self._policy = open_policy(config.policy)
        tuned = config.policy == "gdsf" and config.max_bytes is not None
        self._tuner = Tuner(config.max_bytes, low=AHEAD) if tuned and config.max_bytes else None
        self._door = Door()
        self.lock = threading.RLock()
        self.held: dict[KVKey, Held] = {}
        self.lives: dict[KVKey, Life] = {}
        self.pins: set[KVKey] = set()
        self.bytes = self.raw_bytes = self.blob_bytes = 0
        self.counters: Counter[str] = Counter()
        self._misses = Misses(self._policy)
        self._clock = 0.0
        self._next: deque[tuple[Item, Reason]] = deque()  # victims chosen ahead; one that was used since is skipped
        self._chosen_by: Policy | None = None

    @property
    def policy(self) -> Policy:
        """What ranks them now: with ``gdsf``, the variant that would have saved most lately."""
        return self._policy if self._tuner is None else self._tuner.policy

    def get(self, key: KVKey, *, use: bool = False) -> Held | None:
        """What is held of ``key``; ``use`` notes a use, or that it was asked for in vain."""
        with self.lock:
            held = self.held.get(key)
            if not use:
                return held
            now = time.time()
            if held is not None:
                life = self.lives[key]
                item = life.item
                usage = self.policy.used(item.usage, item.bytes, item.cost, now=now, clock=self._clock)
                life.item = replace(item, usage=usage)
                if self._tuner is not None:
                    self._tuner.asked(key, item.bytes, item.cost, now=now)
            elif self.config.max_bytes is not None:
                self._misses.note(key, now=now)
            return held

    def outlook(self, key: KVKey) -> tuple[float, float]:
        """What the choice of a codec for a newcomer goes by, as on disk: uses to expect by what is remembered of it,
        and how scarce room is (0: less than half of the limit is held, 1: entries are about to be evicted for it)."""
        with self.lock:
            before = self._misses.get(key)
            frequency = 1.0 if before is None else max(1.0, before.frequency)
            limit = self.config.max_bytes
            filled = 0.0 if limit is None else self.bytes / limit
            return frequency, min(1.0, max(0.0, (filled - 0.5) / (AHEAD - 0.5)))

    def insert(self, new: Held, *, forced: bool = False) -> list[KVKey] | None:
        """Hold ``new``; what was evicted for it, or None if it is worth less than that (unless ``forced``).

        Raises ``StoreFullError`` if it cannot fit. A key that is held is left as it is.
        """
        key = new.header.key
        with self.lock:
            if key in self.held:
                return []
            now = time.time()
            newcomer = self._newcomer(new.header, new.size, now)
            victims = self._room_for(newcomer, now, forced=forced)
            if victims is None:
                self.counters["refused"] += 1
                return None
            for item, reason in victims:
                self._evict(item, reason)
            self.held[key] = new
            self.lives[key] = Life(newcomer, created=now)
            self._count(new, 1)
            if self._misses.take(key) is not None and self._tuner is not None:
                self._tuner.asked(key, newcomer.bytes, newcomer.cost, now=now)
            self.counters["put"] += 1
            return [item.key for item, _ in victims]

    def would_take(self, header: Header, size: int) -> bool:
        """Whether ``insert`` of an entry of ``size`` bytes would succeed now."""
        now = time.time()
        with self.lock:
            if header.key in self.held:
                return False
            try:
                return self._room_for(self._newcomer(header, size, now), now, forced=False) is not None
            except StoreFullError:
                return False

    def remove(self, key: KVKey, *, only: Held | None = None, forget: bool = False) -> Held | None:
        """Let go of ``key`` (if it is ``only``); what it was. ``forget``: how it was used, too."""
        with self.lock:
            if forget:
                self._misses.take(key)
            held = self.held.get(key)
            if held is None or (only is not None and held is not only):
                return None
            life = self.lives.pop(key)
            del self.held[key]
            self._count(held, -1)
            if not forget:
                self._misses.keep(key, life.item.usage)
            return held

    def pin(self, keys: Iterable[KVKey], pinned: bool) -> int:
        """Held or not. How many changed."""
        changed = 0
        with self.lock:
            for key in keys:
                if (key in self.pins) == pinned:
                    continue
                (self.pins.add if pinned else self.pins.discard)(key)
                changed += 1
                if key in self.lives:
                    self.lives[key].item = replace(self.lives[key].item, pinned=pinned)
        return changed

    def expire(self) -> list[tuple[KVKey, Reason]]:
        """Evict what has expired, and what is over the limit; who went and why."""
        with self.lock:
            items = [life.item for life in self.lives.values()]
            choice = choose(items, self._rules(1.0), self.policy, need=0, now=time.time(), clock=self._clock)
            self._clock = choice.clock
            for key, reason in choice.victims:
                self._evict(self.lives[key].item, reason)
            return list(choice.victims)

    def clear(self) -> None:
        with self.lock:
            self.held.clear()
            self.lives.clear()
            self._next.clear()
            self.bytes = self.raw_bytes = self.blob_bytes = 0

    def _newcomer(self, header: Header, size: int, now: float) -> Item:
        cost = float(header.tokens)  # what a hit saves: tokens that need not be computed
        usage = self.policy.entered(size, cost, now=now, clock=self._clock, before=self._misses.get(header.key))
        return Item(header.key, size, cost, usage, header.owner, header.key in self.pins)

    def _room_for(self, newcomer: Item, now: float, *, forced: bool) -> list[tuple[Item, Reason]] | None:
        """Who would have to go; None if ``newcomer`` is worth less. Raises ``StoreFullError``."""
        limit = self.config.max_bytes
        if limit is None or self.bytes + newcomer.bytes <= limit:
            return []
        if newcomer.bytes > limit:
            raise StoreFullError(f"a chunk of {newcomer.bytes} bytes is larger than the limit of {limit} in memory")
        policy = self.policy
        free = forced or newcomer.pinned or not self.config.admission
        if not free and self._door.refuses(policy, newcomer, now=now):
            return None
        need = self.bytes + newcomer.bytes - limit
        if self.config.shares or self._chosen_by is not policy:
            self._next.clear()  # whose share is exceeded depends on the newcomer
        victims = self._picked(need)
        if victims is None:
            self._choose(newcomer, policy, now)
            victims = self._picked(need)
        if victims is None:
            why = "policy 'none' evicts nothing" if policy.name == "none" else "too much is pinned"
            raise StoreFullError(f"a chunk of {newcomer.bytes} bytes does not fit in memory: {why} ({limit} bytes)")
        displaced = [item for item, reason in victims if reason == "capacity"]
        return victims if free or self._door.admits(policy, newcomer, displaced, now=now) else None

    def _choose(self, newcomer: Item, policy: Policy, now: float) -> None:
        items = {key: life.item for key, life in self.lives.items()}
        choice = choose(
            items.values(),
            self._rules(AHEAD),
            policy,
            need=newcomer.bytes,
            now=now,
            clock=self._clock,
            owner=newcomer.owner,
        )
        self._next = deque((items[key], reason) for key, reason in choice.victims)
        self._chosen_by, self._clock = policy, choice.clock

    def _picked(self, need: int) -> list[tuple[Item, Reason]] | None:
        """The next victims that make ``need`` bytes; None if there are not enough chosen ahead."""
        picked: list[tuple[Item, Reason]] = []
        while self._next and need > 0:
            item, reason = self._next.popleft()
            life = self.lives.get(item.key)
            if life is not None and life.item is item:  # not gone, used or pinned meanwhile
                picked.append((item, reason))
                need -= item.bytes
        self._next.extendleft(reversed(picked))
        return picked if need <= 0 else None

    def _rules(self, low: float) -> Rules:
        config = self.config
        limit = config.max_bytes if config.max_bytes is not None else sys.maxsize
        return Rules(limit=limit, low=low, shares=config.shares, ttl_s=config.ttl_s)

    def _evict(self, item: Item, reason: Reason) -> None:
        self.remove(item.key)
        self.counters[f"evicted:{reason}"] += 1

    def _count(self, held: Held, sign: int) -> None:
        self.bytes += sign * held.size
        self.raw_bytes += sign * held.header.raw_bytes
        self.blob_bytes += sign * len(held.blob)
