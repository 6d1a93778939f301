"""Room under the limit: who goes, and who may not enter."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from store.config import StoreConfig
from store.errors import StoreFullError
from store.evict import Choice, Door, Item, Policy, Rules, choose
from store.ssd.append import Appender
from store.ssd.collect import collect
from store.ssd.database import Database, Txn
from store.ssd.index import Index
from store.ssd.reclaim import Reclaimer
from store.ssd.rows import INLINE, Grave
from store.ssd.uses import Traffic
from store.types import KVKey

log = logging.getLogger(__name__)

_ROW_BYTES = 12 << 10  # of the index per entry besides its header and payload: pages that are copied to be changed
_MOST_HEADROOM = 1 << 20  # left for the index: LMDB copies pages even to delete
_LOW = 0.9
_SPARSE, _FEW_FILES = 4, 32  # so much larger may all files be than what lives in them


class Need(NamedTuple):
    """Bytes that a put adds to segments, and to the index."""

    segments: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Made:
    """``admitted``: if there is room for the newcomer now, or it is worth less than what would have to go."""

    admitted: bool
    expired: int = 0
    evicted: int = 0


class Room:
    """Keeps the store below ``config.max_bytes``, its index and dead bytes included."""

    def __init__(
        self,
        config: StoreConfig,
        policy: Policy,
        db: Database,
        index: Index,
        appender: Appender,
        reclaimer: Reclaimer,
        note_uses: Callable[[], None],
    ) -> None:
        self._config = config
        self._db = db
        self._index = index
        self._appender = appender
        self._reclaimer = reclaimer
        self.note_uses = note_uses  # to be called before a newcomer is weighed
        self.traffic = Traffic(policy, self.limit, _LOW)
        self._door = Door()
        self._at_door = threading.Lock()

    @property
    def limit(self) -> int | None:
        """Bytes that puts may fill; what is left up to ``max_bytes`` is for the index to delete with."""
        most = self._config.max_bytes
        return None if most is None else most - min(_MOST_HEADROOM, most // 4)

    def held(self, txn: Txn) -> int:
        """Bytes of the device that the store takes."""
        return sum(extent.held for extent in self._index.segments(txn).values()) + self._db.file_bytes()

    def need(self, header: int, payload: int, record: int, *, inline: bool) -> Need:
        if inline:
            return Need(0, header + payload + 4096 + _ROW_BYTES)
        return Need(record, header + _ROW_BYTES)

    def inline_allowed(self, txn: Txn) -> bool:
        """Small payloads go into the index, whose file never shrinks: only up to a quarter of the limit."""
        limit = self.limit
        return limit is None or self._db.file_bytes() - self._db.idle_bytes(txn) < limit // 4

    def short(self, txn: Txn, need: Need) -> int:
        """Bytes by which ``need`` is too much for the limit, or for the device. Without a limit nobody is evicted: then
        ``StoreFullError`` is raised if the device is full."""
        limit, spare = self.limit, max(0, self._db.spare_bytes())
        if limit is None:
            if need.segments > spare:
                raise StoreFullError(
                    f"{self._db.path}: no room on the device for {need.segments} bytes ({spare} free beyond the "
                    "reserve); free some, or set max_bytes, so that old entries make room for new ones"
                )
            return 0
        # Pages freed by the last transactions can be used again only by later ones, hence twice.
        grows = 0 if 2 * need.rows <= self._db.idle_bytes(txn) else need.rows
        return max(0, self.held(txn) + need.segments + grows - limit, need.segments - spare)

    def outlook(self, key: KVKey, txn: Txn) -> tuple[float, float]:
        """What the choice of a codec for a newcomer goes by: uses to expect by what is remembered of it, and how scarce
        room is (0: less than half of the limit is held, 1: entries are about to be evicted for it)."""
        grief = self._index.grief(txn, key)
        frequency = 1.0 if grief is None else max(1.0, grief.frequency)
        limit = self.limit
        filled = 0.0 if limit is None else self.held(txn) / limit
        return frequency, min(1.0, max(0.0, (filled - 0.5) / (_LOW - 0.5)))

    def make(self, newcomer: Item | None, short: int) -> Made:
        """Evict so that ``short`` bytes more are free for ``newcomer``; None: only what has expired, or is beyond the
        limit already.

        Raises ``StoreFullError`` when there is nobody left who could go.
        """
        if self._recycled(short):
            return Made(admitted=True)
        if newcomer is not None and self._turned_away(newcomer):
            self._db.write(partial(self._refuse, newcomer), need=0)
            return Made(admitted=False)
        done = self._reclaimer.done()
        made, graves, empty = self._db.write(partial(self._evict, newcomer, short, done), need=0)
        self._reclaimer.noted(done)
        self._reclaimer.settle(graves, empty)
        if made.evicted or made.expired:
            self._recycled(short)
        return made

    def tidy(self) -> None:
        """Merge segments of which little is left: holes take no room, but files would become more and more."""
        segments = self._db.read(self._index.segments)
        live, files = sum(extent.live for extent in segments.values()), len(segments)
        if files > _FEW_FILES and files * self._appender.segment_bytes > _SPARSE * live:
            self._collect()

    def _recycled(self, short: int) -> bool:
        """Where dead bytes cannot be punched out of their files: copy what lives around them, if they are enough."""
        if self._reclaimer.supported or not short:
            return False
        dead = self._db.read(lambda txn: sum(extent.dead for extent in self._index.segments(txn).values()))
        if dead < short:
            return False
        return self._collect()

    def _collect(self) -> bool:
        """Copy a segment at most, so that no put waits for more; if that freed anything."""
        segments, most = self._reclaimer.segments, self._appender.segment_bytes
        try:
            return collect(self._db, self._index, segments, self._appender, most_bytes=most).freed > 0
        except StoreFullError as error:
            log.warning("%s", error)
            return False

    def _evict(
        self, newcomer: Item | None, short: int, done: dict[Grave, bool], txn: Txn
    ) -> tuple[Made, list[Grave], list[int]]:
        index, now = self._index, time.time()
        self._reclaimer.note(txn, done)
        items = {item.key: item for item in index.items(txn)}
        policy = self.traffic.policy
        choice = self._choose(txn, items, newcomer, short, now, policy)
        victims = list(choice.victims)
        admitted = True
        if newcomer is not None:
            if not choice.enough:
                victims = [(key, reason) for key, reason in victims if reason == "expired"]
                if not victims:
                    raise StoreFullError(
                        f"{self._db.path} is full: at most {self._config.max_bytes} bytes, policy "
                        f"{self._config.policy}, what is pinned stays: no room can be made for {newcomer.bytes} bytes"
                    )
            elif self._config.admission and not newcomer.pinned:
                going = [items[key] for key, reason in victims if reason == "capacity"]
                with self._at_door:
                    admitted = self._door.admits(policy, newcomer, going, now=now)
                if not admitted:
                    victims = [(key, reason) for key, reason in victims if reason == "expired"]
                    self._refuse(newcomer, txn)
        graves, touched = [], []
        for key, reason in victims:
            place = index.remove(txn, key, deleted=False)
            index.mourn(txn, key, items[key].usage, evicted=True)
            index.count(txn, f"evicted:{reason}")
            if place is not None and place.segment != INLINE:
                graves.append(Grave(place.segment, place.offset, place.length, False))
                touched.append(place.segment)
        if victims and admitted:
            index.set_clock(txn, max(index.clock(txn), choice.clock))
        expired = sum(reason == "expired" for _, reason in victims)
        made = Made(admitted, expired, len(victims) - expired)
        return made, graves, self._reclaimer.drop_empty(txn, touched)

    def _turned_away(self, newcomer: Item) -> bool:
        """Refused without a look at who would have to go: all entries would have to be listed for that."""
        # With shares it depends on the owner who would go; what is pinned was asked for by an operator.
        if not self._config.admission or self._config.shares or newcomer.pinned:
            return False
        with self._at_door:
            return self._door.refuses(self.traffic.policy, newcomer, now=time.time())

    def _refuse(self, newcomer: Item, txn: Txn) -> None:
        self._index.count(txn, "refused")
        before = self._index.grief(txn, newcomer.key)
        self._index.mourn(txn, newcomer.key, newcomer.usage, evicted=before is not None and before.evicted)

    def _choose(
        self, txn: Txn, items: dict[KVKey, Item], newcomer: Item | None, short: int, now: float, policy: Policy
    ) -> Choice:
        # What is held beyond the entries themselves (the index, dead bytes) is taken off the limit.
        held, live = self.held(txn), sum(item.bytes for item in items.values())
        limit = self.limit
        if limit is None:
            rules, need = Rules(2 * held + live + 1, _LOW, self._config.shares, self._config.ttl_s), 0
        else:
            # `short` says how much is missing: the limit for the entries is what they have now, less that.
            need = 0 if newcomer is None else newcomer.bytes
            room = live + need - short if short else live + need + max(0, limit - held - need)
            rules = Rules(max(1, room), _LOW, self._config.shares, self._config.ttl_s)
        owner = None if newcomer is None else newcomer.owner
        clock = self._index.clock(txn)
        return choose(items.values(), rules, policy, need=need, now=now, clock=clock, owner=owner)


def segment_bytes(config: StoreConfig) -> int:
    """How large a segment file gets."""
    if config.segment_bytes is not None:
        return config.segment_bytes
    if config.max_bytes is None:
        return 256 << 20
    return min(256 << 20, max(1 << 20, config.max_bytes // 16))
