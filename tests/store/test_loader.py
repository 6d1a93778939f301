"""Layer-wise loading: everything arrives where it belongs, in time or not at all, and nothing arrives afterwards."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from store.codec import open_codec
from store.entry import Header, encode
from store.errors import LostError, StoreError, StoreIOError
from store.held import Held
from store.loader import Loading, Place, PlacesLostError, Reading
from store.types import ChunkKV, KVKey, KVLayout, MissReason

LAYOUT = KVLayout(model="ab12", layers=5, heads=2, head_dim=8, dtype="bfloat16", rope="cd34")
SIZES = (6, 1, 17, 3)
GAP = 2  # rows between places that belong to none
LONG_S = 30.0  # a test that hangs fails here
Act = Callable[[int, Tensor, Tensor], None]


class Chunk:
    """A found entry of ``tokens`` random rows; ``act(layer, k, v)`` runs before each read."""

    def __init__(self, number: int, tokens: int, tier: str = "ssd", act: Act | None = None) -> None:
        generator = torch.Generator().manual_seed(number)
        shape = (LAYOUT.layers, tokens, LAYOUT.heads, LAYOUT.head_dim)
        self.k, self.v = (torch.randn(shape, generator=generator).to(LAYOUT.torch_dtype) for _ in range(2))
        ids = tuple(range(tokens))
        self.chunk = ChunkKV(KVKey(bytes([number]) * 32), LAYOUT, ids, self.k, self.v, 3, b"s" * 32, "tok")
        self.header: Header = Held.made(*encode(self.chunk, open_codec("raw"))).header
        self.tier, self.act = tier, act
        self.order: list[int] = []

    def read(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.order.append(layer)
        if self.act is not None:
            self.act(layer, k, v)
        k.copy_(self.k[layer])
        v.copy_(self.v[layer])

    def advise(self) -> None:
        return None


class Context:
    """Chunks with gaps between them, and staging full of NaN."""

    def __init__(self, sizes: Sequence[int] = SIZES, tier: str = "ssd") -> None:
        self.chunks = [Chunk(i, size, tier) for i, size in enumerate(sizes)]
        self.starts = [GAP + sum(sizes[:i]) + GAP * i for i in range(len(sizes))]
        rows = sum(sizes) + GAP * (len(sizes) + 1)
        shape = (LAYOUT.layers, rows, LAYOUT.heads, LAYOUT.head_dim)
        self.k, self.v = (torch.full(shape, torch.nan, dtype=LAYOUT.torch_dtype) for _ in range(2))

    def load(self, threads: int = 2, timeout_s: float | None = None, executor: Executor | None = None) -> Loading:
        places = [Place(chunk, start) for chunk, start in zip(self.chunks, self.starts, strict=True)]
        return Loading(places, self.k, self.v, Reading(threads, timeout_s, executor))

    def there(self, place: int, layer: int) -> bool:
        chunk, start = self.chunks[place], self.starts[place]
        part = slice(start, start + chunk.header.tokens)
        return torch.equal(self.k[layer, part], chunk.k[layer]) and torch.equal(self.v[layer, part], chunk.v[layer])

    def gaps_untouched(self) -> bool:
        gaps = torch.ones(self.k.shape[1], dtype=torch.bool)
        for chunk, start in zip(self.chunks, self.starts, strict=True):
            gaps[start : start + chunk.header.tokens] = False
        return bool(self.k[:, gaps].isnan().all() and self.v[:, gaps].isnan().all())


@pytest.fixture(autouse=True)
def _threads_for_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contexts here are small; threads are to read them all the same."""
    monkeypatch.setattr("store.loader._SMALL_BYTES", 0)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as made:
        yield made


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.001)


def losing(at: int, reason: MissReason = "evicted") -> Act:
    """Lost at layer ``at``, after NaN was written there."""

    def act(layer: int, k: Tensor, v: Tensor) -> None:
        if layer == at:
            k.fill_(torch.nan)
            v.fill_(torch.nan)
            raise LostError(reason, "gone")

    return act


@pytest.mark.parametrize("tier", ["ssd", "ram"])
@pytest.mark.parametrize("threads", [0, 1, 2, 4])
@pytest.mark.parametrize("sizes", [(), (1,), (40,), SIZES, tuple(range(1, 30))])
@pytest.mark.parametrize("timeout_s", [None, LONG_S])
def test_every_plane_arrives_where_it_belongs(
    tier: str, threads: int, sizes: tuple[int, ...], timeout_s: float | None
) -> None:
    context = Context(sizes, tier)
    with context.load(threads, timeout_s) as loading:
        for layer in range(LAYOUT.layers):
            loading.wait(layer)
            assert all(context.there(place, layer) for place in range(len(sizes)))
    assert context.gaps_untouched()
    assert all(sorted(chunk.order) == list(range(LAYOUT.layers)) for chunk in context.chunks)  # each read once
    assert loading.counts.delivered == sum(sizes) * LAYOUT.token_bytes
    assert loading.counts.copied == (loading.counts.delivered if tier == "ram" else 0)


def test_planes_are_read_layer_by_layer() -> None:
    context, read = Context(), []
    for place, chunk in enumerate(context.chunks):
        chunk.act = lambda layer, k, v, place=place: read.append((layer, place))  # type: ignore[misc]
    with context.load(threads=1, timeout_s=LONG_S) as loading:
        loading.wait(LAYOUT.layers - 1)
    assert read == [(layer, place) for layer in range(LAYOUT.layers) for place in range(len(SIZES))]


def test_the_last_layer_may_be_asked_for_first() -> None:
    context = Context()
    with context.load(threads=0) as loading:
        for layer in reversed(range(LAYOUT.layers)):
            loading.wait(layer)
            assert all(context.there(place, layer) for place in range(len(SIZES)))


def test_readers_run_ahead_of_a_consumer_that_computes() -> None:
    context = Context()
    with context.load() as loading:
        until(lambda: loading.counts.delivered == sum(SIZES) * LAYOUT.token_bytes)
        assert loading.counts.waited_s == 0.0
        assert all(context.there(place, layer) for place in range(len(SIZES)) for layer in range(LAYOUT.layers))


def test_without_threads_nothing_is_read_that_was_not_asked_for() -> None:
    context = Context()
    with context.load(threads=0) as loading:
        loading.wait(1)
    assert [chunk.order for chunk in context.chunks] == [[0, 1]] * len(SIZES)
    assert bool(context.k[2:].isnan().all())


def test_little_in_ram_is_read_by_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.loader._SMALL_BYTES", 1 << 20)
    context = Context(tier="ram")
    before = threading.active_count()
    with context.load() as loading:
        assert threading.active_count() == before
        loading.wait(0)
    assert [chunk.order for chunk in context.chunks] == [[0]] * len(SIZES)


@pytest.mark.parametrize("held", range(LAYOUT.layers))
def test_a_layer_is_waited_for_and_those_before_it_are_not(held: int) -> None:
    context, gate = Context(), threading.Event()
    context.chunks[2].act = lambda layer, k, v: gate.wait(LONG_S) and None if layer == held else None
    with context.load(timeout_s=LONG_S) as loading:  # so that the consumer does not read for itself
        for layer in range(held):
            loading.wait(layer)
        threading.Timer(0.05, gate.set).start()
        loading.wait(held)
        assert gate.is_set()
        assert context.there(2, held)
        assert 0.0 < loading.counts.waited_s < LONG_S


def test_a_consumer_that_would_wait_reads_itself(pool: ThreadPoolExecutor) -> None:
    """All threads of the executor are taken, by somebody else."""
    gate = threading.Event()
    for _ in range(3):
        pool.submit(gate.wait, LONG_S)
    try:
        for tier, timeout_s in (("ssd", None), ("ram", 0.0)):
            context = Context(tier=tier)
            with context.load(timeout_s=timeout_s, executor=pool) as loading:
                for layer in range(LAYOUT.layers):
                    loading.wait(layer)
            assert all(context.there(place, layer) for place in range(len(SIZES)) for layer in range(LAYOUT.layers))
    finally:
        gate.set()


def test_time_is_counted_once_however_many_read() -> None:
    context = Context((2, 2))
    together = threading.Barrier(2)

    def act(layer: int, k: Tensor, v: Tensor) -> None:
        together.wait(LONG_S)
        time.sleep(0.02)

    for chunk in context.chunks:
        chunk.act = act
    begin = time.perf_counter()
    with context.load(threads=2, timeout_s=LONG_S) as loading:
        time.sleep(0.01)
        loading.wait(LAYOUT.layers - 1)
        elapsed, counts = time.perf_counter() - begin, loading.counts
    assert LAYOUT.layers * 0.02 <= counts.busy_s <= elapsed
    assert counts.read_s >= 1.5 * LAYOUT.layers * 0.02
    assert counts.waited_s <= elapsed - 0.01


def test_loadings_share_an_executor(pool: ThreadPoolExecutor) -> None:
    contexts = [Context(tuple(random.Random(i).choices(range(1, 9), k=9))) for i in range(8)]
    loadings = [context.load(executor=pool, timeout_s=LONG_S) for context in contexts]
    for layer in range(LAYOUT.layers):
        for context, loading in zip(contexts, loadings, strict=True):
            loading.wait(layer)
            assert all(context.there(place, layer) for place in range(9))
    for loading in loadings:
        loading.cancel()
    assert pool.submit(lambda: 7).result(LONG_S) == 7


# Lost ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("at", range(LAYOUT.layers))
@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_lost_place_is_told_once_and_the_others_arrive(threads: int, at: int, place: int) -> None:
    context = Context()
    context.chunks[place].act = losing(at)
    told = []
    with context.load(threads) as loading:
        for layer in range(LAYOUT.layers):
            while True:
                try:
                    loading.wait(layer)
                    break
                except PlacesLostError as error:
                    told.append(error.lost)
            others = [i for i in range(len(SIZES)) if i != place]
            assert all(context.there(i, layer) for i in others)
    assert told == [{place: "evicted"}]
    assert context.gaps_untouched()


def test_a_loss_is_told_before_the_consumer_gets_to_its_layer() -> None:
    """What was computed meanwhile would be done again: the sooner it is known, the better."""
    context = Context()
    context.chunks[1].act = losing(LAYOUT.layers - 1, "checksum_failed")
    with context.load() as loading:
        until(lambda: bool(loading._untold))
        with pytest.raises(PlacesLostError, match=r"place 1 \(checksum_failed\)"):
            loading.wait(0)


def test_a_loss_is_told_while_the_layer_is_not_there_yet() -> None:
    context, gate = Context(), threading.Event()
    context.chunks[0].act = lambda layer, k, v: gate.wait(LONG_S) and None
    context.chunks[1].act = losing(0)
    with context.load(timeout_s=LONG_S) as loading:
        try:
            with pytest.raises(PlacesLostError, match=r"place 1 \(evicted\)"):
                loading.wait(0)
            assert loading.counts.waited_s < LONG_S / 2
        finally:
            gate.set()


def test_several_are_lost_at_once() -> None:
    context = Context()
    for place, reason in ((0, "evicted"), (3, "checksum_failed")):
        context.chunks[place].act = losing(0, reason)  # type: ignore[arg-type]
    with context.load() as loading:
        until(lambda: len(loading._untold) == 2)
        with pytest.raises(PlacesLostError) as told:
            loading.wait(2)
        assert told.value.lost == {0: "evicted", 3: "checksum_failed"}
        loading.wait(2)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_store_that_fails_is_a_lost_place(threads: int) -> None:
    context = Context()

    def fail(layer: int, k: Tensor, v: Tensor) -> None:
        raise StoreIOError("/dev/nowhere: I/O error")

    context.chunks[2].act = fail
    with context.load(threads) as loading:
        with pytest.raises(PlacesLostError) as told:
            loading.wait(0)
        assert told.value.lost == {2: "checksum_failed"}
        loading.wait(LAYOUT.layers - 1)


@pytest.mark.parametrize("timeout_s", [None, LONG_S])
@pytest.mark.parametrize("threads", [0, 1, 2])
def test_a_defect_is_raised_where_its_work_is_waited_for(threads: int, timeout_s: float | None) -> None:
    """Not swallowed by a thread, and not waited for for ever."""
    context = Context()

    def fail(layer: int, k: Tensor, v: Tensor) -> None:
        time.sleep(0.05)  # the consumer waits by then
        raise ZeroDivisionError("a defect")

    context.chunks[2].act = fail
    begin = time.monotonic()
    with context.load(threads, timeout_s) as loading, pytest.raises(ZeroDivisionError):
        loading.wait(LAYOUT.layers - 1)
    assert time.monotonic() - begin < LONG_S / 2


# In time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("at", range(LAYOUT.layers))
def test_a_place_that_hangs_is_given_up_and_holds_up_no_other(at: int, threads: int) -> None:
    context, gate = Context(), threading.Event()
    context.chunks[0].act = lambda layer, k, v: gate.wait(LONG_S) and None if layer >= at else None
    with context.load(threads, timeout_s=0.1) as loading:
        try:
            until(lambda: all(map(all, loading._arrived[1:])))
            until(lambda: all(loading._arrived[0][:at]))
            for layer in range(at):
                loading.wait(layer)
            begin = time.monotonic()
            with pytest.raises(PlacesLostError) as told:
                loading.wait(at)
            assert told.value.lost == {0: "load_timeout"}
            for layer in range(LAYOUT.layers):
                loading.wait(layer)
                assert all(context.there(place, layer) for place in range(1, len(SIZES)))
            assert 0.05 < time.monotonic() - begin < LONG_S / 2
            assert not loading.cancel(quiet=False)
        finally:
            gate.set()
        assert loading.cancel()


def test_computing_does_not_use_up_the_timeout() -> None:
    context, gate = Context((8,)), threading.Event()
    context.chunks[0].act = lambda layer, k, v: gate.wait(LONG_S) and None
    with context.load(threads=1, timeout_s=1.0) as loading:
        time.sleep(1.1)  # the consumer computes
        threading.Timer(0.05, gate.set).start()
        loading.wait(LAYOUT.layers - 1)
        assert context.there(0, LAYOUT.layers - 1)


def test_waits_share_one_timeout() -> None:
    """Three layers in time, each after most of it, would be twice the promise."""
    context, gates = Context((8,)), [threading.Event() for _ in range(LAYOUT.layers)]
    context.chunks[0].act = lambda layer, k, v: gates[layer].wait(LONG_S) and None
    with context.load(threads=1, timeout_s=1.5) as loading:
        threading.Timer(0.7, gates[0].set).start()
        loading.wait(0)
        threading.Timer(LONG_S / 10, gates[1].set).start()
        begin = time.monotonic()
        with pytest.raises(PlacesLostError, match=r"place 0 \(load_timeout\)"):
            loading.wait(1)
        assert time.monotonic() - begin < 1.3
        for gate in gates:
            gate.set()


def test_no_patience_at_all_takes_what_is_there() -> None:
    context = Context()
    with context.load(timeout_s=0.0) as loading:
        until(lambda: loading.counts.delivered == sum(SIZES) * LAYOUT.token_bytes)
        for layer in range(LAYOUT.layers):
            loading.wait(layer)


# Cancelled -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_written_after_cancel(seed: int) -> None:
    draw = random.Random(seed)
    context = Context(tuple(range(1, 9)))
    pause = draw.uniform(0.0, 0.004)
    for chunk in context.chunks:
        chunk.act = lambda layer, k, v: time.sleep(0.001)
    loading = context.load(threads=3)
    time.sleep(pause)
    assert loading.cancel()
    k, v = context.k.clone(), context.v.clone()
    time.sleep(0.005)
    assert torch.equal(k.view(torch.int16), context.k.view(torch.int16))
    assert torch.equal(v.view(torch.int16), context.v.view(torch.int16))


def test_a_cancelled_loading_is_not_waited_for() -> None:
    context, gate = Context(), threading.Event()
    context.chunks[0].act = lambda layer, k, v: gate.wait(LONG_S) and None
    loading = context.load()
    try:
        assert not loading.cancel(quiet=False)
        with pytest.raises(StoreError, match="cancelled before layer 4"):
            loading.wait(4)
    finally:
        gate.set()
    assert loading.cancel()


def test_threads_of_its_own_end_with_their_work() -> None:
    before = threading.active_count()
    for _ in range(5):
        with Context().load(threads=3, timeout_s=LONG_S) as loading:
            loading.wait(LAYOUT.layers - 1)
    until(lambda: threading.active_count() <= before)


# Odd ones ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_what_is_not_lost_is_right(seed: int, pool: ThreadPoolExecutor) -> None:
    """Random sizes, pauses, losses, threads and orders of layers."""
    draw = random.Random(seed)
    context = Context(tuple(draw.randint(1, 6) for _ in range(draw.randint(1, 12))), draw.choice(["ram", "ssd"]))
    doomed: dict[int, int] = {
        i: draw.randrange(LAYOUT.layers) for i in range(len(context.chunks)) if draw.random() < 0.3
    }
    for place, chunk in enumerate(context.chunks):
        pause, lose = draw.choice([0.0, 0.0, 0.001]), losing(doomed.get(place, -1))

        def act(layer: int, k: Tensor, v: Tensor, pause: float = pause, lose: Act = lose) -> None:
            time.sleep(pause)
            lose(layer, k, v)

        chunk.act = act
    told: list[tuple[int, MissReason]] = []
    timeout_s = draw.choice([None, LONG_S])
    with context.load(draw.randint(0, 4), timeout_s, draw.choice([None, pool])) as loading:
        layers = draw.sample(range(LAYOUT.layers), LAYOUT.layers)
        while layers:
            try:
                loading.wait(layers[-1])
            except PlacesLostError as error:
                told.extend(error.lost.items())
                continue
            layer = layers.pop()
            assert all(context.there(i, layer) for i in range(len(context.chunks)) if i not in doomed)
    assert sorted(told) == [(place, "evicted") for place in sorted(doomed)]
    assert context.gaps_untouched()


def test_tensors_of_inference_mode_are_loaded_from_any_thread() -> None:
    """vLLM's worker runs in inference mode; its tensors cannot be written to outside of it."""
    with torch.inference_mode():
        context = Context()
        with context.load(timeout_s=LONG_S) as loading:
            loading.wait(LAYOUT.layers - 1)
    assert context.k.is_inference()
    assert all(context.there(place, LAYOUT.layers - 1) for place in range(len(SIZES)))


def test_what_does_not_fit_is_refused_before_anything_is_read() -> None:
    context = Context()
    k, v, place = context.k, context.v, Place(context.chunks[0], 0)
    for bad_place, bad_k, bad_v in (
        (replace(place, start=k.shape[1] - SIZES[0] + 1), k, v),
        (replace(place, start=-1), k, v),
        (place, k.float(), v),
        (place, k, v[1:]),
        (place, k[:, :, :1], v),
        (place, k.transpose(0, 1).contiguous().transpose(0, 1), v),
        (place, k.flatten(), v),
    ):
        with pytest.raises(ValueError, match=r"needs contiguous|outside"):
            Loading([bad_place], bad_k, bad_v)
    assert context.chunks[0].order == []
    for threads, timeout_s in ((-1, None), (2, -0.1), (2, float("nan"))):
        with pytest.raises(ValueError, match="must be"):
            Reading(threads, timeout_s)
