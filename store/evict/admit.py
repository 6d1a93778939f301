"""Who may enter a full store (after TinyLFU, arXiv 1512.00727: a newcomer against what would have to go for it)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from store.evict.types import Item, Policy, Usage
from store.types import KVKey


@dataclass(frozen=True)
class Toll:
    """What a byte of those who must go is worth, mean over the next ``ahead`` seconds, in the policy's unit."""

    price: float
    ahead: float


def toll(policy: Policy, bytes: int, victims: Sequence[Item], *, now: float) -> Toll | None:
    """What must be worth giving up for ``bytes``; None if nobody has to go.

    ``victims``: in the order in which they would go (those of ``choose`` with reason ``capacity``); only those that
    make the room count. They are looked at over as long a time as they were not used.
    """
    going = []
    for victim in victims:
        if bytes <= 0:
            break
        going.append(victim)
        bytes -= victim.bytes
    if not going:
        return None
    ahead = max(0.0, now - min(victim.usage.last for victim in going))
    worths = policy.worth(going, now=now, ahead=ahead).tolist()
    loss: float = sum(worth * victim.bytes for worth, victim in zip(worths, going, strict=True))
    return Toll(loss / sum(victim.bytes for victim in going), ahead)


def admits(policy: Policy, newcomer: Item, victims: Sequence[Item], *, now: float) -> bool:
    """If ``newcomer`` may enter a full tier where ``victims`` (see ``toll``) must go for it.

    Somebody has asked for it: yes, it goes to what was used last, and what a scan brings in goes out first again.
    Nobody has (precomputed ahead, or all documents of a new collection at once): if it is worth as much by the byte.
    """
    return newcomer.usage.frequency >= 1.0 or _pays(
        policy, newcomer, toll(policy, newcomer.bytes, victims, now=now), now
    )


def _pays(policy: Policy, newcomer: Item, asked: Toll | None, now: float) -> bool:
    return asked is None or bool(policy.worth([newcomer], now=now, ahead=asked.ahead)[0] >= asked.price)


class Door:
    """``admits`` that remembers the toll a newcomer was refused for, so that a tier need not look for victims again for
    each of a million cold chunks. Not thread-safe.

    It holds for ``keep_s`` seconds: uses only make it rise, and what is aged by then is little.
    """

    def __init__(self, keep_s: float = 10.0) -> None:
        self.keep_s = keep_s
        self._asked: tuple[Toll, Policy, float] | None = None  # since when

    def refuses(self, policy: Policy, newcomer: Item, *, now: float) -> bool:
        """To be asked first when there is no room: True, or False for "look who would have to go"."""
        if newcomer.usage.frequency >= 1.0 or self._asked is None:
            return False
        asked, unit, since = self._asked
        return unit == policy and 0.0 <= now - since <= self.keep_s and not _pays(policy, newcomer, asked, now)

    def admits(self, policy: Policy, newcomer: Item, victims: Sequence[Item], *, now: float) -> bool:
        """As the function of that name."""
        if newcomer.usage.frequency >= 1.0:
            return True
        asked = toll(policy, newcomer.bytes, victims, now=now)
        pays = _pays(policy, newcomer, asked, now)
        self._asked = None if pays or asked is None else (asked, policy, now)
        return pays


def missed(policy: Policy, before: Usage | None, *, now: float, times: int = 1) -> Usage:
    """What to remember of a key that was asked for and is not held; give it to ``Policy.entered`` as ``before``."""
    return policy.used(before or Usage(0.0, now, 0.0), 1, 0.0, now=now, clock=0.0, times=times)


class Misses:
    """What is remembered of keys that are not held: the last ``most`` of them. Not thread-safe."""

    def __init__(self, policy: Policy, most: int = 100_000) -> None:
        if most < 1:
            raise ValueError(f"most must be positive, not {most}")
        self.policy = policy
        self.most = most
        self._usage: dict[KVKey, Usage] = {}

    def note(self, key: KVKey, *, now: float, times: int = 1) -> None:
        """``key`` was asked for and was not there."""
        self.keep(key, missed(self.policy, self._usage.get(key), now=now, times=times))

    def keep(self, key: KVKey, usage: Usage) -> None:
        """Remember ``usage`` of an entry that was evicted."""
        self._usage[key] = usage
        if len(self._usage) > self.most + self.most // 8:
            # An eighth at once: on the average the price is a few comparisons per note.
            stay = heapq.nlargest(self.most, self._usage.items(), key=lambda pair: pair[1].last)
            self._usage = dict(stay)

    def get(self, key: KVKey) -> Usage | None:
        return self._usage.get(key)

    def take(self, key: KVKey) -> Usage | None:
        """The same, and forget it: the key is held now."""
        return self._usage.pop(key, None)

    def __len__(self) -> int:
        return len(self._usage)
