"""What nobody can beat, and what somebody who knows the future does."""

from __future__ import annotations

import heapq

from scripts.eviction_study.tier import Score
from scripts.eviction_study.trace import Trace


def next_uses(trace: Trace) -> list[int]:
    """For each access the number of the next one that asks for its chunk; ``len(accesses)`` if there is none."""
    end = len(trace.accesses)
    following: dict[int, int] = {}
    answer = [end] * end
    for at in range(end - 1, -1, -1):
        access = trace.accesses[at]
        answer[at] = following.get(access.chunk, end)
        if access.asked:
            following[access.chunk] = at
    return answer


def belady(trace: Trace, capacity: int) -> Score:
    """Belady's MIN with bypass, size-aware: out goes what saves least by the byte and access until its next use.

    For chunks of one size and worth it is MIN itself, the best there is; else a good heuristic (the problem is
    NP-hard): see ``upper_bound``. Evicts no more than it must: no watermark.
    """
    following, end = next_uses(trace), len(trace.accesses)
    density = [chunk.saved_s / chunk.bytes for chunk in trace.chunks]
    # Held chunks by their next use; the value of one falls as time goes on only relative to others, so ranks are kept
    # by the time of the next use among those of one density, and a heap per density is looked at when one has to go.
    held: dict[int, int] = {}  # chunk -> its next use
    heaps: dict[float, list[tuple[int, int]]] = {}
    held_bytes = 0
    score = Score()
    for at, access in enumerate(trace.accesses):
        chunk = trace.chunks[access.chunk]
        hit = access.chunk in held
        if access.asked:
            score.ask(chunk.owner, chunk.saved_s, hit)
        if hit:
            held_bytes -= chunk.bytes
            del held[access.chunk]
        if following[at] == end:
            continue
        held[access.chunk] = following[at]
        held_bytes += chunk.bytes
        heapq.heappush(heaps.setdefault(density[access.chunk], []), (-following[at], access.chunk))
        while held_bytes > capacity:
            worst: tuple[float, float] | None = None
            for worth, heap in heaps.items():
                while heap and held.get(heap[0][1]) != -heap[0][0]:
                    heapq.heappop(heap)  # used or evicted since
                if heap and (worst is None or worth / (-heap[0][0] - at) < worst[0]):
                    worst = worth / (-heap[0][0] - at), worth
            assert worst is not None
            _, victim = heapq.heappop(heaps[worst[1]])
            del held[victim]
            held_bytes -= trace.chunks[victim].bytes
    return score


def upper_bound(trace: Trace, capacity: int) -> float:
    """Saved seconds that no policy can exceed (PFOO-U of Berger, Beckmann, Harchol-Balter, arXiv 1711.03709).

    A hit needs its chunk's bytes held since the access before it; all hits share ``capacity`` x accesses. The most
    valuable by the byte and access get it first, the last one in part: the linear relaxation of that knapsack.
    """
    intervals = []
    before: dict[int, int] = {}
    for at, access in enumerate(trace.accesses):
        chunk = trace.chunks[access.chunk]
        if access.asked and access.chunk in before and chunk.bytes <= capacity:
            intervals.append((chunk.saved_s, chunk.bytes * (at - before[access.chunk])))
        before[access.chunk] = at
    intervals.sort(key=lambda interval: interval[0] / interval[1], reverse=True)
    room, saved = float(capacity * len(trace.accesses)), 0.0
    for value, takes in intervals:
        saved += value * min(1.0, room / takes)
        room -= takes
        if room <= 0:
            break
    return saved
