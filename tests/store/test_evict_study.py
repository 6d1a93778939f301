"""The simulator: its bounds are bounds, its traces are what they say, and our policy saves more than LRU in it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the scripts are no package that is installed

from scripts import simulate_eviction  # noqa: E402
from scripts.eviction_study.bound import belady, next_uses, upper_bound  # noqa: E402
from scripts.eviction_study.classic import ClassicGdsf  # noqa: E402
from scripts.eviction_study.cost import CostModel  # noqa: E402
from scripts.eviction_study.tier import Score, replay  # noqa: E402
from scripts.eviction_study.trace import NAMES, RECORDED, Access, Chunk, K, Trace, make_trace  # noqa: E402
from store.evict import Gdsf, Lru, Policy  # noqa: E402

COST = CostModel()
few = settings(max_examples=60, deadline=None)


def trace_of(chunks: list[Chunk], asked: list[tuple[int, bool]]) -> Trace:
    accesses = tuple(Access(10.0 * at, number, ask) for at, (number, ask) in enumerate(asked))
    return Trace("drawn", tuple(chunks), accesses)


@st.composite
def traces(draw: st.DrawFn, *, alike: bool = False, chunks: int = 8, accesses: int = 60) -> Trace:
    n = draw(st.integers(1, chunks))
    sizes = (
        [(1, 1.0)] * n
        if alike
        else draw(st.lists(st.tuples(st.integers(1, 9), st.floats(0.0, 5.0)), min_size=n, max_size=n))
    )
    asked = draw(
        st.lists(st.tuples(st.integers(0, n - 1), st.booleans() if not alike else st.just(True)), max_size=accesses)
    )
    return trace_of([Chunk(1, bytes, saved) for bytes, saved in sizes], asked)


def best_by_trying_everything(trace: Trace, capacity: int) -> int:
    """Hits of the best there is, for chunks of one byte: over all sets that may be held after each access."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for access in trace.accesses:
        after: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            hits += access.chunk in held
            with_it = held | {access.chunk}
            # Dropping nothing, or one entry to make room (the newcomer itself too): lazily is as good as ahead.
            choices = [with_it] if len(with_it) <= capacity else [with_it - {victim} for victim in with_it]
            for choice in choices:
                after[choice] = max(after.get(choice, 0), hits)
        states = after
    return max(states.values())


@few
@given(traces(alike=True, chunks=6, accesses=24), st.integers(1, 4))
def test_belady_is_the_best_there_is_for_chunks_of_one_size(trace: Trace, capacity: int) -> None:
    assert belady(trace, capacity).hits == best_by_trying_everything(trace, capacity)


@few
@given(traces(alike=True), st.integers(1, 6), st.sampled_from([Lru(), Gdsf(), ClassicGdsf()]), st.booleans())
def test_no_policy_beats_belady_for_chunks_of_one_size(
    trace: Trace, capacity: int, policy: Policy, tuned: bool
) -> None:
    score = replay(trace, policy, capacity, tuned=tuned and policy.name == "gdsf", admission=True, low=1.0)
    assert score.hits <= belady(trace, capacity).hits
    assert score.asked == sum(access.asked for access in trace.accesses)


@few
@given(traces(), st.integers(1, 30), st.sampled_from([Lru(), Gdsf(), ClassicGdsf()]), st.booleans())
def test_nobody_belady_included_exceeds_the_upper_bound(
    trace: Trace, capacity: int, policy: Policy, admission: bool
) -> None:
    bound = upper_bound(trace, capacity) + 1e-9
    assert replay(trace, policy, capacity, admission=admission).saved_s <= bound
    assert belady(trace, capacity).saved_s <= bound


@few
@given(traces())
def test_a_store_that_holds_everything_saves_all_but_the_first_use_of_each(trace: Trace) -> None:
    room = sum(chunk.bytes for chunk in trace.chunks)
    first = len({access.chunk for access in trace.accesses if access.asked})
    seen: set[int] = set()
    hits = 0
    for access in trace.accesses:
        hits += access.asked and access.chunk in seen
        seen.add(access.chunk)
    for policy in (Lru(), Gdsf(), ClassicGdsf()):
        score = replay(trace, policy, room, admission=True)
        assert score.hits == hits >= score.asked - first
        assert score.evicted == score.refused == 0
        assert score.saved_s == pytest.approx(upper_bound(trace, room))


def test_the_next_use_is_the_next_time_it_is_asked_for() -> None:
    trace = trace_of([Chunk(1, 1, 1.0)] * 2, [(0, True), (1, False), (0, False), (1, True), (0, True)])
    assert next_uses(trace) == [4, 3, 4, 5, 5]


def test_the_clock_of_classic_gdsf_buries_an_old_favourite() -> None:
    """The inflation: everything that goes raises what newcomers start from."""
    chunks = [Chunk(1, 1, 1.0)] * 2000
    asked = [(0, True)] * 50 + [(1 + i, True) for i in range(1500)] + [(0, True)]
    trace = trace_of(chunks, asked)
    score = replay(trace, ClassicGdsf(), 20, low=1.0)
    assert score.hits == 49, "the last request found the favourite of long ago"
    kept = replay(trace_of(chunks, asked[:350] + asked[-1:]), ClassicGdsf(), 20, low=1.0)
    assert kept.hits == 50, "after a few hundred others it should still have been there"


@cache
def made(name: str) -> Trace:
    return make_trace(name, 7, COST)


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_is_the_same_for_the_same_seed_and_ordered_in_time(name: str) -> None:
    trace = made(name)
    if name in ("drift", "musique sessions"):  # made by all the means there are
        assert make_trace(name, 7, COST) == trace
        assert make_trace(name, 8, COST).accesses != trace.accesses
    times = [access.time for access in trace.accesses]
    assert times == sorted(times)
    assert len(trace.accesses) >= 30_000
    assert all(0 <= access.chunk < len(trace.chunks) for access in trace.accesses)
    assert all(chunk.bytes > 0 and chunk.saved_s > 0 for chunk in trace.chunks)


def test_the_recorded_trace_is_what_it_says() -> None:
    data = json.loads(RECORDED.read_text())
    assert len(data["questions"]) == 100
    assert all(len(found) == len(set(found)) == 10 >= K for found in data["questions"])
    assert {number for found in data["questions"] for number in found} == set(range(len(data["tokens"])))
    assert all(1 <= tokens <= 512 for tokens in data["tokens"])


def test_a_hit_saves_the_prefill_less_the_load() -> None:
    # 2 x 8e9 x 512 + 2 x 32 x 4096 x 512^2 FLOP at 400 TFLOP/s; 64 MiB at 4.8 GB/s.
    assert COST.prefill_s(512) == pytest.approx(20.65e-3, rel=1e-3)
    assert COST.stored_bytes(512) == 64 << 20
    assert COST.saved_s(512, 64 << 20) == pytest.approx(20.65e-3 - 13.98e-3, rel=1e-3)
    assert COST.saved_s(512, 1 << 40) == 0.0


@pytest.mark.parametrize(("name", "least"), [("musique zipf", 1.3), ("sessions", 1.0), ("bulk precompute", 1.05)])
def test_ours_saves_more_than_lru(name: str, least: float) -> None:
    trace = made(name)
    trace = replace(trace, accesses=trace.accesses[: len(trace.accesses) // 3])
    limit = int(0.1 * trace.footprint)
    lru = replay(trace, Lru(), limit)
    ours = replay(trace, Gdsf(), limit, tuned=True, admission=True)
    assert ours.saved_s >= least * lru.saved_s
    assert ours.written <= lru.written


def test_a_quiet_owner_keeps_its_share_beside_a_loud_one() -> None:
    trace = made("two owners")
    limit = int(0.1 * trace.footprint)
    shared = replay(trace, Gdsf(), limit)
    free = replay(replace(trace, shares={}), Gdsf(), limit)
    assert shared.saved_by_owner["quiet"] > 1.2 * free.saved_by_owner["quiet"]


def test_the_command_prints_every_figure_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--json", "--traces", "musique zipf", "--capacities", "0.2"])
    assert simulate_eviction.main() == 0
    answer = json.loads(capsys.readouterr().out)
    [row] = answer["rows"]
    assert (answer["seed"], row["trace"], row["capacity"]) == (7, "musique zipf", 0.2)
    saved = {name: score["saved_s"] for name, score in row["scores"].items()}
    assert saved["lru"] < saved["ours"] < saved["belady"] <= row["bound"]
    assert row["scores"]["lru"]["most_s"] == pytest.approx(row["scores"]["belady"]["most_s"])


def test_the_command_fails_where_ours_saves_less_than_lru(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def simulate(name: str, capacity: float, *_: object) -> simulate_eviction.Row:
        scores = {policy: Score(100, 50, 50.0, 100.0, written=1) for policy in simulate_eviction.POLICIES}
        scores["ours"].saved_s = 49.0
        return simulate_eviction.Row(name, capacity, scores, 90.0)

    monkeypatch.setattr(simulate_eviction, "simulate", simulate)
    monkeypatch.setattr(sys, "argv", ["simulate", "--traces", "drift", "--capacities", "0.2"])
    assert simulate_eviction.main() == 1
    assert "ours saves less than lru: drift at 20% (-2.00%)" in capsys.readouterr().out


def test_the_command_refuses_a_capacity_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--capacities", "1.5"])
    with pytest.raises(SystemExit):
        simulate_eviction.main()
    assert "a capacity must be within 0..1, not [1.5]" in capsys.readouterr().err
