"""Who goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from store.evict.types import Choice, Item, Policy, Reason, Rules, Worths
from store.types import KVKey


def choose(
    items: Iterable[Item],
    rules: Rules,
    policy: Policy,
    *,
    need: int,
    now: float,
    clock: float,
    owner: str | None = None,
) -> Choice:
    """Victims among ``items`` (all that a tier holds) so that ``need`` more bytes fit into ``rules.limit``.

    First what has expired, needed or not. If that is not enough: down to ``rules.low`` of the limit, so that it is not
    called again for the next newcomer: entries of owners above their share, then of all; in the order of what a byte
    is worth (``Policy.worth``), last of all those in the part for ``Policy.recent``, the longest unused first; ties go
    to the longer unused, then to the smaller key. Pinned entries never go. ``owner``: whom ``need`` counts against.
    ``now``: seconds, as in ``Usage.last``. ``enough`` is False if ``need`` does not fit even so (what could go is
    listed all the same).
    """
    held = 0
    by_owner: defaultdict[str, int] = defaultdict(int)
    victims: list[tuple[KVKey, Reason]] = []
    kept: list[Item] = []
    for item in items:
        if not item.pinned and rules.ttl_s is not None and now - item.usage.last > rules.ttl_s:
            victims.append((item.key, "expired"))
            continue
        held += item.bytes
        by_owner[item.owner] += item.bytes
        if not item.pinned:
            kept.append(item)
    victims.sort()
    if held + need <= rules.limit or policy.name == "none":
        return Choice(tuple(victims), clock, held + need <= rules.limit)

    goal = min(rules.limit - need, int(rules.limit * rules.low))
    worths = policy.worth(kept, now=now)
    # All of it: then they go in the order of their last use, none is left over for its worth.
    order = _ranked(kept, worths, policy.recent * goal if policy.recent < 1.0 else held)
    if owner is not None:
        by_owner[owner] += need
    allowed = {name: rules.limit * share for name, share in rules.shares.items()}
    gone: set[int] = set()
    if any(by_owner[name] > most for name, most in allowed.items()):
        for at in order:
            if held <= goal:
                break
            item = kept[at]
            if item.owner in allowed and by_owner[item.owner] > allowed[item.owner]:
                victims.append((item.key, "share"))
                gone.add(at)
                held -= item.bytes
                by_owner[item.owner] -= item.bytes
    highest = clock
    for at in order:
        if held <= goal:
            break
        if at not in gone:
            victims.append((kept[at].key, "capacity"))
            held -= kept[at].bytes
            highest = max(highest, float(worths[at]))
    return Choice(tuple(victims), highest, held + need <= rules.limit)


def _ranked(items: Sequence[Item], worths: Worths, recent: float) -> list[int]:
    """Numbers of ``items`` in the order in which they go; what was used last, up to ``recent`` bytes, comes last."""
    last = np.array([item.usage.last for item in items], dtype=np.float64)
    digests = np.frombuffer(b"".join(item.key.digest for item in items), dtype=">u8")[::4]
    safe: npt.NDArray[np.bool_] = np.zeros(len(items), dtype=np.bool_)
    if recent > 0:
        # What nobody has asked for was not used, however lately it came.
        unused = np.array([item.usage.frequency < 1.0 for item in items], dtype=np.bool_)
        newest = np.lexsort((digests, -last, unused))
        sizes = np.array([item.bytes for item in items], dtype=np.int64)[newest]
        safe[newest] = (np.cumsum(sizes) <= recent) & ~unused[newest]
    order: list[int] = np.lexsort((digests, last, np.where(safe, last, worths), safe)).tolist()
    return order
