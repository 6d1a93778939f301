"""Layer-wise loading: reader threads run ahead of the consumer, layer by layer over all chunks of a context.

CacheBlend (arXiv 2405.16444, section 5) hides the loading of layer l + 1 behind the computing of layer l, with one
thread. Here several read straight into the consumer's tensors, and the consumer reads too rather than wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from store.base import Found
from store.errors import LostError, StoreError
from store.types import MissReason

log = logging.getLogger(__name__)

# Less than this in RAM is copied by the consumer, sooner than threads are woken for it.
_SMALL_BYTES = 1 << 20


class PlacesLostError(StoreError):
    """Entries that were found cannot be read to their end: ``lost`` has the reason of each place, by its index."""

    def __init__(self, lost: Mapping[int, MissReason]) -> None:
        super().__init__(f"lost while loading: {', '.join(f'place {i} ({lost[i]})' for i in sorted(lost))}")
        self.lost = dict(lost)


@dataclass(frozen=True)
class Reading:
    """How a context is read: by ``threads`` of ``executor`` (None: by new ones) beside the consumer; 0: by it alone.

    ``timeout_s``: how long the consumer stands still for it, all waits together; then what is late is lost
    (``load_timeout``). None: as long as it takes. With 0 threads a read that hangs is waited for all the same.
    An executor is best shared by all loadings of an engine.
    """

    threads: int = 2
    timeout_s: float | None = None
    executor: Executor | None = None

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(f"threads must be 0 or more, not {self.threads}")
        if self.timeout_s is not None and not self.timeout_s >= 0:
            raise ValueError(f"timeout_s must be None, 0 or more, not {self.timeout_s}")


@dataclass(frozen=True)
class Place:
    """Where an entry goes: rows ``start .. start + T - 1``."""

    found: Found
    start: int


@dataclass(frozen=True)
class LoadCounts:
    """``delivered`` bytes of K and V arrived; ``copied`` of them by way of other memory (a decoded plane, a copy in
    RAM; a raw plane comes from a file without one).

    ``busy_s``: seconds in which something was being read, ``read_s``: the same, summed over threads. ``waited_s``: the
    consumer's seconds in ``wait``, its own reads among them.
    """

    delivered: int
    copied: int
    busy_s: float
    read_s: float
    waited_s: float


class Loading:
    """Fills ``k`` and ``v`` [L, N, H, D] (CPU, contiguous, of the entries' dtype) with the planes of ``places``.

    Planes are read by layer, and within a layer by place. One consumer calls ``wait``, for layers in any order. Leave
    the context or ``cancel`` before ``k`` and ``v`` are used for anything else. Raises ``ValueError`` for a place that
    does not fit.
    """

    def __init__(self, places: Sequence[Place], k: Tensor, v: Tensor, reading: Reading | None = None) -> None:
        self.places = tuple(places)
        self._k, self._v = k, v
        self._reading = reading if reading is not None else Reading()
        for place in self.places:
            _check(place, k, v)
        layers, count = k.shape[0], len(self.places)
        self._changed = threading.Condition()
        self._queue = deque((layer, index) for layer in range(layers) for index in range(count))
        self._left = [count] * layers  # planes of each layer that are still to come
        self._arrived = [bytearray(layers) for _ in self.places]
        self._busy = [0] * count  # reads under way
        self._gone: set[int] = set()  # lost places
        self._untold: dict[int, MissReason] = {}  # those the consumer has not heard of
        self._cancelled = self._broken = False
        self._delivered = self._copied = 0
        self._busy_s = self._read_s = self._waited_s = 0.0
        self._since = 0.0  # when the first of the reads under way began
        # Memory does not hang: what lies there the consumer may read even if it has promised not to wait for long.
        alone = self._reading.threads == 0 or self._reading.timeout_s is None
        self._own = [alone or place.found.tier == "ram" for place in self.places]
        self._futures = self._start()

    def wait(self, layer: int) -> None:
        """Return when every place's plane of ``layer`` is in ``k`` and ``v``.

        Raises ``PlacesLostError`` as soon as a place is known to be lost, at whichever layer: once for each. It is not
        waited for again. Its rows hold anything, and until ``cancel`` returns a read that was too late may write there.
        """
        begin = time.perf_counter()
        try:
            while (plane := self._await(layer, begin)) is not None:
                self._read(*plane)
        finally:
            self._waited_s += time.perf_counter() - begin

    def cancel(self, *, quiet: bool = True) -> bool:
        """Read no more; on return nobody writes to ``k`` or ``v`` any more. Not ``quiet``: reads under way are left to
        themselves (they keep the tensors alive), and the answer is whether there are none."""
        with self._changed:
            self._cancelled = True
            self._queue.clear()
            for future in self._futures:
                future.cancel()
            while quiet and any(self._busy):
                self._changed.wait()
            return not any(self._busy)

    @property
    def counts(self) -> LoadCounts:
        with self._changed:
            now = time.perf_counter() - self._since if any(self._busy) else 0.0
            return LoadCounts(self._delivered, self._copied, self._busy_s + now, self._read_s, self._waited_s)

    def __enter__(self) -> Loading:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cancel()

    # -- reader threads -----------------------------------------------------------------------------------------------

    def _start(self) -> list[Future[None]]:
        threads = min(self._reading.threads, len(self._queue))
        size = sum(place.found.header.raw_bytes for place in self.places)
        in_ram = all(place.found.tier == "ram" for place in self.places)
        if not threads or (in_ram and size < _SMALL_BYTES):
            return []
        executor = self._reading.executor
        if executor is not None:
            return [executor.submit(self._run) for _ in range(threads)]
        executor = ThreadPoolExecutor(threads, thread_name_prefix="kv-load")
        try:
            return [executor.submit(self._run) for _ in range(threads)]
        finally:
            executor.shutdown(wait=False)  # its threads end with their work

    def _run(self) -> None:
        while True:
            with self._changed:
                plane = self._take(self._k.shape[0] - 1)
            if plane is None:
                return
            self._read(*plane)

    # -- the consumer -------------------------------------------------------------------------------------------------

    def _await(self, layer: int, begin: float) -> tuple[int, int] | None:
        """A plane that the consumer, who waits since ``begin``, may read meanwhile; None when ``layer`` is there."""
        with self._changed:
            while True:
                if self._broken:
                    self._raise()
                if self._untold:
                    lost, self._untold = self._untold, {}
                    raise PlacesLostError(lost)
                if not self._left[layer]:
                    return None
                if self._cancelled:
                    raise StoreError(f"the loading was cancelled before layer {layer} was there")
                plane = self._take(layer, own=True)
                if plane is not None:
                    return plane
                rest = self._rest(begin)
                if rest is None or rest > 0:
                    self._changed.wait(rest)
                    continue
                for index, arrived in enumerate(self._arrived):
                    if not arrived[layer]:
                        self._lose(index, "load_timeout")

    def _rest(self, begin: float) -> float | None:
        """Seconds that the consumer, who waits since ``begin``, may still wait."""
        timeout = self._reading.timeout_s
        return None if timeout is None else timeout - self._waited_s - (time.perf_counter() - begin)

    def _raise(self) -> None:
        """A reader met what is no error of the store: it belongs to whoever waits for its work."""
        for future in wait(self._futures, return_when=FIRST_EXCEPTION).done:
            if not future.cancelled():
                future.result()
        raise StoreError("the loading has failed before")

    # -- both ---------------------------------------------------------------------------------------------------------

    def _take(self, last: int, *, own: bool = False) -> tuple[int, int] | None:
        """The next plane of a layer up to ``last``, for the caller to read (with the lock held). None: there is none.

        Entries that nobody is reading go first: one that hangs then holds up no thread but its own.
        """
        at = None
        for i, (layer, index) in enumerate(self._queue):
            if layer > last:
                break
            if own and not self._own[index]:
                continue
            if not self._busy[index]:
                at = i
                break
            if at is None:
                at = i
        if at is None:
            return None
        plane = self._queue[at]
        del self._queue[at]
        if not any(self._busy):
            self._since = time.perf_counter()
        self._busy[plane[1]] += 1
        return plane

    def _read(self, layer: int, index: int) -> None:
        place = self.places[index]
        rows = slice(place.start, place.start + place.found.header.tokens)
        lost: MissReason | None = None
        ended = False
        begin = time.perf_counter()
        try:
            # Tensors made in inference mode, as vLLM's worker does, may be written to in that mode only.
            with torch.inference_mode():
                place.found.read(layer, self._k[layer, rows], self._v[layer, rows])
            ended = True
        except LostError as error:
            lost, ended = error.reason, True
        except StoreError as error:  # a store that cannot be read costs time, never an answer
            log.warning("chunk %s cannot be read: %s", place.found.header.key.hex, error)
            lost, ended = "checksum_failed", True
        finally:
            now = time.perf_counter()
            with self._changed:
                self._busy[index] -= 1
                self._read_s += now - begin
                if not any(self._busy):
                    self._busy_s += now - self._since
                self._broken |= not ended
                if lost is not None:
                    self._lose(index, lost)
                elif ended and index not in self._gone:
                    self._arrive(layer, index)
                if lost is not None or not ended or self._cancelled or not self._left[layer]:
                    self._changed.notify_all()

    def _arrive(self, layer: int, index: int) -> None:
        self._arrived[index][layer] = 1
        self._left[layer] -= 1
        found = self.places[index].found
        size = found.header.raw_bytes // len(self._left)
        self._delivered += size
        self._copied += 0 if found.header.codec.direct and found.tier != "ram" else size

    def _lose(self, index: int, reason: MissReason) -> None:
        if index in self._gone:
            return
        self._gone.add(index)
        self._untold[index] = reason
        self._queue = deque(plane for plane in self._queue if plane[1] != index)
        for layer, there in enumerate(self._arrived[index]):
            self._left[layer] -= not there


def _check(place: Place, k: Tensor, v: Tensor) -> None:
    """Raises ``ValueError`` unless the entry can be read straight into its rows of ``k`` and ``v``."""
    header = place.found.header
    layout = header.layout
    for name, x in (("k", k), ("v", v)):
        shape = (layout.layers, x.shape[1] if x.dim() == 4 else 0, layout.heads, layout.head_dim)
        if tuple(x.shape) != shape or x.dtype != layout.torch_dtype or x.device.type != "cpu" or not x.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}; chunk {header.key.hex[:16]} needs contiguous "
                f"[{layout.layers}, N, {layout.heads}, {layout.head_dim}] {layout.torch_dtype} on the CPU"
            )
        if not 0 <= place.start <= x.shape[1] - header.tokens:
            raise ValueError(f"{header.tokens} rows at {place.start} are outside the {x.shape[1]} rows of {name}")
