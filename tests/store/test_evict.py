"""Who goes: `choose` keeps its promises for any entries, and the policies rank as they say."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from store.evict import Choice, Gdsf, Item, Lru, Policy, Rules, Usage, choose, open_policy
from store.types import KVKey

NOW = 1_000_000.0
few = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
OWNERS = ("ann", "bob", "cy")


def key(number: int) -> KVKey:
    return KVKey(hashlib.sha256(number.to_bytes(8, "little")).digest())


def item(
    number: int,
    bytes: int = 100,
    *,
    uses: float = 1.0,
    last: float = NOW,
    first: float | None = None,
    cost: float = 1.0,
) -> Item:
    return Item(key(number), bytes, cost, Usage(uses, last, last if first is None else first))


def gone(choice: Choice, reason: str) -> list[KVKey]:
    return [victim for victim, why in choice.victims if why == reason]


ages = st.floats(0.0, 1e6)
POLICIES: tuple[Policy, ...] = (Lru(), Gdsf(), Gdsf(recent=0.0), Gdsf(decay=0.0, recent=0.2), Gdsf(recent=1.0))
policies = st.sampled_from(POLICIES)


@st.composite
def stores(draw: st.DrawFn) -> list[Item]:
    items = []
    for number in range(draw(st.integers(0, 25))):
        last = NOW - draw(ages)
        usage = Usage(draw(st.sampled_from([0.5, 1.0, 2.0, 7.5, 1000.0])), last, last - draw(ages))
        bytes, cost = draw(st.integers(1, 1000)), draw(st.floats(0.0, 10.0))
        items.append(Item(key(number), bytes, cost, usage, draw(st.sampled_from(OWNERS)), draw(st.booleans())))
    return items


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    shares = {owner: draw(st.floats(0.05, 1.0)) for owner in OWNERS[:2] if draw(st.booleans())}
    ttl_s = draw(st.none() | st.floats(1.0, 1e6))
    return Rules(draw(st.integers(1, 20_000)), draw(st.floats(0.1, 1.0)), shares, ttl_s)


# Choose


@few
@given(stores(), rules(), policies, st.integers(0, 5000))
def test_a_pinned_entry_never_goes(items: list[Item], law: Rules, policy: Policy, need: int) -> None:
    choice = choose(items, law, policy, need=need, now=NOW, clock=0.0)
    pinned = {one.key for one in items if one.pinned}
    assert not pinned & {victim for victim, _ in choice.victims}


@few
@given(stores(), rules(), policies, st.integers(0, 5000))
def test_the_need_is_met_or_the_choice_says_it_is_not(items: list[Item], law: Rules, policy: Policy, need: int) -> None:
    choice = choose(items, law, policy, need=need, now=NOW, clock=0.0)
    victims = [victim for victim, _ in choice.victims]
    assert len(set(victims)) == len(victims)
    left = [one for one in items if one.key not in set(victims)]
    held = sum(one.bytes for one in left)
    assert choice.enough == (held + need <= law.limit)
    if not choice.enough:
        assert all(one.pinned for one in left), "it gave up with entries left that could go"


@few
@given(stores(), rules(), policies, st.integers(0, 5000))
def test_it_goes_down_to_the_watermark_and_not_one_entry_further(
    items: list[Item], law: Rules, policy: Policy, need: int
) -> None:
    choice = choose(items, law, policy, need=need, now=NOW, clock=0.0)
    paid = [victim for victim, reason in choice.victims if reason != "expired"]
    sizes = {one.key: one.bytes for one in items}
    expired = set(gone(choice, "expired"))
    before = sum(one.bytes for one in items if one.key not in expired)
    if before + need <= law.limit:
        assert not paid
        return
    goal = min(law.limit - need, int(law.limit * law.low))
    after = before - sum(sizes[victim] for victim in paid)
    assert not paid or after + sizes[paid[-1]] > goal
    assert after <= goal or all(one.pinned for one in items if one.key not in expired | set(paid))


@few
@given(stores(), rules(), policies, st.integers(0, 5000), st.randoms(use_true_random=False))
def test_the_order_of_the_entries_does_not_matter(
    items: list[Item], law: Rules, policy: Policy, need: int, chance: random.Random
) -> None:
    choice = choose(items, law, policy, need=need, now=NOW, clock=3.0)
    chance.shuffle(items)
    assert choose(iter(items), law, policy, need=need, now=NOW, clock=3.0) == choice


@few
@given(stores(), rules(), policies, st.integers(0, 5000))
def test_what_is_worth_least_goes_first_and_what_was_used_last_goes_last(
    items: list[Item], law: Rules, policy: Policy, need: int
) -> None:
    items = [replace(one, owner="cy") for one in items]  # nobody has a share
    choice = choose(items, law, policy, need=need, now=NOW, clock=0.0)
    by_key = {one.key: one for one in items}
    victims = [by_key[victim] for victim in gone(choice, "capacity")]
    expired = set(gone(choice, "expired"))
    staying = [one for one in items if one.key not in expired and not one.pinned and one not in victims]
    worths = dict(zip(by_key, policy.worth(items, now=NOW).tolist(), strict=True))
    order = [worths[one.key] for one in victims]
    if policy.recent == 0.0:
        assert order == sorted(order)
        assert not victims or all(worths[one.key] >= order[-1] for one in staying)
    elif staying and victims:
        # Who stays is worth as much as who went, or was used later than some that went.
        oldest = min(one.usage.last for one in victims)
        assert all(worths[one.key] >= min(order) or one.usage.last >= oldest for one in staying)


@few
@given(stores(), rules(), policies)
def test_all_that_has_expired_goes_and_nothing_else_does_while_there_is_room(
    items: list[Item], law: Rules, policy: Policy
) -> None:
    law = replace(law, limit=10**9)
    choice = choose(items, law, policy, need=0, now=NOW, clock=0.0)
    assert {victim for victim, _ in choice.victims} == {
        one.key for one in items if law.ttl_s is not None and NOW - one.usage.last > law.ttl_s and not one.pinned
    }
    assert gone(choice, "expired") == [victim for victim, _ in choice.victims]


@few
@given(stores(), rules(), policies, st.integers(0, 5000), st.sampled_from(OWNERS))
def test_nobody_loses_an_entry_while_another_is_above_its_share(
    items: list[Item], law: Rules, policy: Policy, need: int, owner: str
) -> None:
    choice = choose(items, law, policy, need=need, now=NOW, clock=0.0, owner=owner)
    by_key = {one.key: one for one in items}
    held = dict.fromkeys(OWNERS, 0)
    held[owner] += need
    for one in items:
        held[one.owner] += one.bytes
    left = dict(by_key)
    for victim, reason in choice.victims:
        one = left.pop(victim)
        over = {name for name, share in law.shares.items() if held[name] > law.limit * share}
        if reason == "share":
            assert one.owner in over
        elif reason == "capacity":
            assert not any(
                other.owner in over and not other.pinned for other in left.values() if other.owner != one.owner
            )
        held[one.owner] -= one.bytes


def test_an_owner_may_hold_more_than_its_share_while_nobody_wants_the_room() -> None:
    items = [replace(item(i), owner="ann") for i in range(9)]
    assert choose(items, Rules(1000, 0.9, {"ann": 0.1}), Lru(), need=100, now=NOW, clock=0.0).victims == ()


def test_the_newcomer_counts_against_the_share_of_its_owner() -> None:
    items = [replace(item(i, last=NOW - i), owner="ann" if i < 5 else "bob") for i in range(10)]
    law = Rules(1000, 1.0, {"ann": 0.5, "bob": 0.5})
    [(victim, reason)] = choose(items, law, Lru(), need=100, now=NOW, clock=0.0, owner="ann").victims
    assert (victim, reason) == (key(4), "share")  # the longest unused one of ann's, though bob's are older
    [(victim, reason)] = choose(items, law, Lru(), need=100, now=NOW, clock=0.0, owner="bob").victims
    assert (victim, reason) == (key(9), "share")


def test_the_policy_none_evicts_only_what_has_expired() -> None:
    items = [item(1, last=NOW - 100), item(2)]
    choice = choose(items, Rules(150, ttl_s=50.0), open_policy("none"), need=100, now=NOW, clock=0.0)
    assert choice.victims == ((key(1), "expired"),)
    assert not choice.enough


@few
@given(stores(), rules(), policies, st.integers(0, 5000), st.floats(0.0, 1e7))
def test_the_clock_never_falls_behind_and_rises_to_what_went(
    items: list[Item], law: Rules, policy: Policy, need: int, clock: float
) -> None:
    choice = choose(items, law, policy, need=need, now=NOW, clock=clock)
    worths = dict(zip((one.key for one in items), policy.worth(items, now=NOW).tolist(), strict=True))
    assert choice.clock == max([clock, *(worths[victim] for victim in gone(choice, "capacity"))])


def test_a_hundred_thousand_entries_are_ranked_in_well_under_a_second() -> None:
    chance = random.Random(1)
    items = []
    for i in range(100_000):
        first, last = sorted((chance.uniform(0, NOW), chance.uniform(0, NOW)))
        items.append(item(i, chance.randrange(1, 10**6), uses=chance.randrange(1, 50), last=last, first=first))
    limit = sum(one.bytes for one in items)
    times = []
    for _ in range(2):
        start = time.process_time()  # the machine may be busy with something else
        choice = choose(items, Rules(limit), Gdsf(), need=10**6, now=NOW, clock=0.0)
        times.append(time.process_time() - start)
    assert choice.enough
    assert len(choice.victims) > 5000
    assert min(times) < 1.0


# Policies


def test_lru_is_the_lru_of_an_ordered_dict() -> None:
    chance, policy, capacity = random.Random(3), Lru(), 10
    held: dict[KVKey, Item] = {}
    truth: OrderedDict[KVKey, None] = OrderedDict()
    for step in range(1500):
        now, number = NOW + step, min(int(chance.paretovariate(0.7)), 60)
        if key(number) in held:
            one = held[key(number)]
            held[one.key] = replace(one, usage=policy.used(one.usage, 100, 1.0, now=now, clock=0.0))
            truth.move_to_end(one.key)
        else:
            choice = choose(held.values(), Rules(100 * capacity, 1.0), policy, need=100, now=now, clock=0.0)
            for victim, _ in choice.victims:
                del held[victim]
            usage = policy.entered(100, 1.0, now=now, clock=0.0, before=None)
            held[key(number)] = Item(key(number), 100, 1.0, usage)
            truth[key(number)] = None
            if len(truth) > capacity:
                truth.popitem(last=False)
        assert set(held) == set(truth)


@few
@given(st.floats(0.0, 0.95), st.integers(2, 400), st.floats(10.0, 1e5), st.floats(0.0, 1e5))
def test_the_need_is_the_sum_over_all_uses_if_they_are_evenly_spread(
    decay: float, uses: int, between: float, since: float
) -> None:
    assume(between / uses > 2.0)  # uses that are closer than the shortest age differ from an even spread
    assume(since >= between / uses)
    when = [NOW - since - between * i / (uses - 1) for i in range(uses)]
    true = sum((NOW - t + 1.0) ** -decay for t in when)
    [found] = Gdsf(decay=decay).worth([item(1, 1, uses=uses, last=when[0], first=when[-1])], now=NOW)
    assert found == pytest.approx(true, rel=0.15)


def test_one_use_is_worth_its_age_to_the_minus_decay_and_none_half_of_it() -> None:
    policy = Gdsf(decay=0.5)
    once, never = policy.worth([item(1, 1, last=NOW - 99.0), item(2, 1, uses=0.5, last=NOW - 99.0)], now=NOW)
    assert once == pytest.approx(0.1)
    assert never == pytest.approx(0.05)


@few
@given(st.floats(0.0, 0.99), ages, ages, st.integers(1, 10**6), st.floats(0.0, 1e6))
def test_worth_falls_with_age_and_grows_with_uses_cost_and_smallness(
    decay: float, since: float, between: float, uses: int, later: float
) -> None:
    policy = Gdsf(decay=decay)
    base = item(1, 1000, uses=uses, last=NOW - since, first=NOW - since - between)
    more = replace(base, usage=policy.used(base.usage, 1000, 1.0, now=NOW, clock=0.0))
    now, costly, small, used = policy.worth(
        [base, replace(base, cost=2.0), replace(base, bytes=500), more], now=NOW
    ).tolist()
    assert costly == pytest.approx(2 * now)
    assert small == pytest.approx(2 * now)
    # What lies between the first and the last use is taken as even: one more may blur it, but not by half.
    assert used > now * 0.75
    assert policy.worth([base], now=NOW + later)[0] <= now * (1 + 1e-9)
    assert policy.worth([base], now=NOW, ahead=later)[0] <= now * (1 + 1e-9)


@few
@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12), st.floats(-1e12, 1e12), st.floats(0.0, 1e9), policies)
def test_no_clock_however_wrong_makes_worth_anything_but_a_finite_number(
    last: float, first: float, now: float, ahead: float, policy: Policy
) -> None:
    items = [Item(key(i), 0, 1.0, Usage(uses, last, first)) for i, uses in enumerate((0.0, 0.5, 1.0, 2.0, 1e9))]
    worths = policy.worth(items, now=now, ahead=ahead)
    assert np.isfinite(worths).all()
    assert isinstance(policy, Lru) or (worths >= 0).all()


def test_nothing_to_rank_is_no_error() -> None:
    for policy in POLICIES:
        assert policy.worth([], now=NOW).tolist() == []
        assert choose([], Rules(10), policy, need=11, now=NOW, clock=0.0) == Choice((), 0.0, False)


def test_uses_noted_together_count_like_uses_noted_one_by_one() -> None:
    for policy in (Lru(), Gdsf()):
        start = policy.entered(100, 1.0, now=NOW, clock=0.0, before=None)
        together = policy.used(start, 100, 1.0, now=NOW + 5, clock=0.0, times=3)
        single = start
        for _ in range(3):
            single = policy.used(single, 100, 1.0, now=NOW + 5, clock=0.0)
        assert together == single


def test_an_old_favourite_does_not_live_for_ever() -> None:
    """A hundred uses, and none since: what is used now and then must get its place, and not only by recency."""
    policy = Gdsf(recent=0.0)
    favourite = item(0, uses=100, last=NOW, first=NOW - 1000)
    for hours in range(1, 24 * 100):
        now = NOW + 3600 * hours
        modest = item(1, uses=4, last=now - 1800, first=now - 4 * 3600)
        choice = choose([favourite, modest], Rules(200), policy, need=100, now=now, clock=0.0)
        if gone(choice, "capacity")[0] == favourite.key:
            break
    else:
        pytest.fail("the favourite outlived a hundred days without a single use")
    assert hours > 24, "it was gone within a day: its uses counted for nothing"


def test_gdsf_refuses_a_decay_and_a_part_out_of_range() -> None:
    for fields in ({"decay": 1.0}, {"decay": -0.1}, {"decay": math.nan}, {"recent": 1.1}, {"recent": -0.1}):
        with pytest.raises(ValueError, match=r"must be .* not "):
            Gdsf(**fields)


def test_an_unknown_policy_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="'lfu' is unknown; choose one of gdsf, lru, none"):
        open_policy("lfu")
    assert [open_policy(name).name for name in ("gdsf", "lru", "none")] == ["gdsf", "lru", "none"]
