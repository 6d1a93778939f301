"""Who may enter a full store, what is remembered of those outside, and what the tuner learns from the traffic."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.evict import Door, Gdsf, Item, Lru, Misses, Policy, Rules, Tuner, Usage, admits, choose, missed
from store.evict import tune as tune_module
from store.types import KVKey

NOW = 1_000_000.0


def key(number: int) -> KVKey:
    return KVKey(hashlib.sha256(number.to_bytes(8, "little")).digest())


def resident(number: int, uses: float, unused_for: float = 600.0, bytes: int = 100) -> Item:
    return Item(key(number), bytes, 1.0, Usage(uses, NOW - unused_for, NOW - 2 * unused_for))


def newcomer(policy: Policy, before: Usage | None, bytes: int = 100, now: float = NOW) -> Item:
    return Item(key(999), bytes, 1.0, policy.entered(bytes, 1.0, now=now, clock=0.0, before=before))


def load(held: dict[KVKey, Item], coming: Item, law: Rules, policy: Policy, now: float) -> bool:
    """What a tier does with a newcomer."""
    if sum(one.bytes for one in held.values()) + coming.bytes > law.limit:
        victims = choose(held.values(), law, policy, need=coming.bytes, now=now, clock=0.0).victims
        if not admits(policy, coming, [held[victim] for victim, _ in victims], now=now):
            return False
        for victim, _ in victims:
            del held[victim]
    held[coming.key] = coming
    return True


# Admission


def test_whatever_somebody_asked_for_is_admitted() -> None:
    policy = Gdsf()
    asked = newcomer(policy, missed(policy, None, now=NOW))
    assert asked.usage.frequency == 1.0
    assert admits(policy, asked, [resident(1, uses=1000, unused_for=1.0)], now=NOW)


def test_what_nobody_asked_for_does_not_displace_what_is_used() -> None:
    policy = Gdsf()
    assert not admits(policy, newcomer(policy, None), [resident(1, uses=2)], now=NOW)
    assert not admits(policy, newcomer(policy, None), [resident(1, uses=50, unused_for=86_400)], now=NOW)


def test_it_displaces_what_nobody_asked_for_either_and_enters_where_nobody_has_to_go() -> None:
    policy = Gdsf()
    assert admits(policy, newcomer(policy, None), [resident(1, uses=0.5)], now=NOW)
    assert admits(policy, newcomer(policy, None), [], now=NOW)


def test_a_large_newcomer_is_weighed_against_all_who_must_go_and_no_more() -> None:
    policy = Gdsf()
    victims = [resident(1, uses=0.5), resident(2, uses=50), resident(3, uses=50)]
    assert admits(policy, newcomer(policy, None, bytes=100), victims, now=NOW)
    assert not admits(policy, newcomer(policy, None, bytes=101), victims, now=NOW)


def test_lru_admits_everything() -> None:
    assert admits(Lru(), newcomer(Lru(), None), [resident(1, uses=1000, unused_for=1.0)], now=NOW)


def test_an_empty_store_and_one_that_is_not_full_admit_everything() -> None:
    held: dict[KVKey, Item] = {}
    policy = Gdsf()
    for i in range(10):
        cold = Item(key(i), 100, 0.0, policy.entered(100, 0.0, now=NOW, clock=0.0, before=None))
        assert load(held, cold, Rules(1000), policy, NOW)
    assert len(held) == 10


def test_a_million_cold_documents_do_not_flush_the_hot_set() -> None:
    """Ten times the store in chunks that nobody asked for: they take the room of their like only."""
    policy, law = Gdsf(), Rules(10_000)
    hot = {key(i): resident(i, uses=3 + i, unused_for=3600.0) for i in range(60)}
    held = dict(hot)
    for i in range(60, 100):
        held[key(i)] = resident(i, uses=0.5, unused_for=7200.0)
    entered = 0
    for i in range(1000, 2000):
        now = NOW + i / 100
        usage = policy.entered(100, 1.0, now=now, clock=0.0, before=None)
        entered += load(held, Item(key(i), 100, 1.0, usage), law, policy, now)
    assert set(hot) <= set(held)
    assert entered >= 40, "the newest of the cold ones should have displaced the oldest"


def test_a_scan_that_is_asked_for_takes_the_recent_part_only_where_lru_loses_everything() -> None:
    survivors = {}
    for policy in (Gdsf(recent=0.5), Lru()):
        misses = Misses(policy)
        held = {key(i): resident(i, uses=20, unused_for=60.0) for i in range(100)}
        for i in range(1000, 2000):
            now = NOW + i / 100
            misses.note(key(i), now=now)
            usage = policy.entered(100, 1.0, now=now, clock=0.0, before=misses.take(key(i)))
            assert load(held, Item(key(i), 100, 1.0, usage), Rules(10_000, 0.98), policy, now)
        survivors[policy.name] = sum(key(i) in held for i in range(100))
    assert survivors["lru"] == 0
    assert survivors["gdsf"] >= 45


# The door


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 50.0), st.floats(0.0, 1e6), st.integers(1, 500)), max_size=6), st.booleans())
def test_the_door_decides_as_admits_does(lives: list[tuple[float, float, int]], asked: bool) -> None:
    policy = Gdsf()
    victims = [resident(i, uses, age, bytes) for i, (uses, age, bytes) in enumerate(lives)]
    coming = newcomer(policy, missed(policy, None, now=NOW) if asked else None)
    door = Door()
    assert not door.refuses(policy, coming, now=NOW), "it has seen nothing yet"
    admitted = admits(policy, coming, victims, now=NOW)
    assert door.admits(policy, coming, victims, now=NOW) == admitted
    assert door.refuses(policy, coming, now=NOW) == (not admitted)


def test_the_door_remembers_a_refusal_for_a_while_and_for_one_policy_only() -> None:
    policy, door = Gdsf(), Door(keep_s=10.0)
    cold = newcomer(policy, None)
    assert not door.admits(policy, cold, [resident(1, uses=20)], now=NOW)
    assert door.refuses(policy, cold, now=NOW + 10)
    assert not door.refuses(policy, cold, now=NOW + 10.1)
    assert not door.refuses(policy, cold, now=NOW - 1), "the time was set back"
    assert not door.refuses(Gdsf(decay=0.2), cold, now=NOW), "another policy has another unit"
    assert not door.refuses(policy, newcomer(policy, missed(policy, None, now=NOW)), now=NOW), "somebody asked for it"
    precious = Item(key(7), 1, 1000.0, cold.usage)
    assert not door.refuses(policy, precious, now=NOW), "it is worth more than what was asked"


# Misses


def test_a_miss_and_an_earlier_life_are_remembered_when_the_entry_comes() -> None:
    policy, misses = Gdsf(), Misses(Gdsf())
    misses.keep(key(1), Usage(5.0, NOW - 100, NOW - 900))
    misses.note(key(1), now=NOW)
    assert misses.get(key(1)) == Usage(6.0, NOW, NOW - 900)
    before = misses.take(key(1))
    assert before is not None
    assert misses.get(key(1)) is None
    assert policy.entered(100, 1.0, now=NOW, clock=0.0, before=before) == before


def test_what_comes_back_unasked_keeps_its_uses_and_begins_a_new_time_to_live() -> None:
    policy = Gdsf()
    usage = policy.entered(100, 1.0, now=NOW, clock=0.0, before=Usage(5.0, NOW - 1000, NOW - 9000))
    assert usage == Usage(5.0, NOW, NOW - 9000)
    back = Item(key(1), 100, 1.0, usage)
    assert choose([back], Rules(1000, ttl_s=500.0), policy, need=0, now=NOW + 1, clock=0.0).victims == ()


def test_what_came_unasked_and_went_unasked_is_new_when_it_comes_again() -> None:
    policy = Gdsf()
    first = policy.entered(100, 1.0, now=NOW, clock=0.0, before=None)
    again = policy.entered(100, 1.0, now=NOW + 500, clock=0.0, before=first)
    assert again.frequency < 1.0
    assert again.last == NOW + 500
    assert policy.used(again, 100, 1.0, now=NOW + 600, clock=0.0) == Usage(1.0, NOW + 600, NOW + 600)


def test_misses_are_bounded_and_the_latest_are_kept() -> None:
    misses = Misses(Gdsf(), most=80)
    for i in range(1000):
        misses.note(key(i), now=NOW + i)
        assert len(misses) <= 90
    assert all(misses.get(key(i)) is not None for i in range(920, 1000))
    with pytest.raises(ValueError, match="most must be positive, not 0"):
        Misses(Gdsf(), most=0)


# The tuner


def ask_zipf(tuner: Tuner, requests: int, keys: int) -> None:
    chance = random.Random(5)
    weights = [1 / (i + 1) ** 0.8 for i in range(keys)]
    for step, number in enumerate(chance.choices(range(keys), weights, k=requests)):
        tuner.asked(key(number), 100, 1.0, now=NOW + step)


def ask_in_bursts(tuner: Tuner, requests: int) -> None:
    """Each topic is asked about forty times within three minutes, and hardly ever again."""
    chance = random.Random(6)
    for step in range(requests):
        topic = 1000 + step // 40 + chance.randrange(4)
        tuner.asked(key(10 * topic + chance.randrange(10)), 100, 1.0, now=NOW + 10_000 + step)


def test_the_tuner_learns_what_the_traffic_rewards_and_learns_anew_when_it_changes() -> None:
    tuner = Tuner(6000)
    start = tuner.policy.recent
    assert start == 1.0, "until something better is shown it does what lru does"
    ask_zipf(tuner, 8000, 1000)
    assert tuner.policy.recent <= 0.2
    ask_in_bursts(tuner, 8000)
    assert tuner.policy.recent > 0.5


def test_the_tuner_keeps_a_bounded_sample_of_a_large_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "_MOST", 16)
    tuner = Tuner(100_000)
    for step in range(20_000):
        number = step % 3000 if step % 2 else step
        tuner.asked(key(number), 100 + number % 7, 1.0, now=NOW + step)
    assert len(tuner._seen) <= 8 * 16 + 500
    for miniature in tuner._miniatures:
        assert len(miniature.held) <= 64
        assert miniature.held <= set(tuner._seen)
        assert miniature.bytes == sum(tuner._seen[one].bytes for one in miniature.held)


def test_an_entry_that_came_back_in_another_size_does_not_spoil_the_books() -> None:
    tuner = Tuner(1000)
    for step in range(2000):
        tuner.asked(key(step % 15), 100 if step % 3 else 60, 1.0, now=NOW + step)
    for miniature in tuner._miniatures:
        assert miniature.bytes == sum(tuner._seen[one].bytes for one in miniature.held) <= 1000
