"""Specs: what they mean, what is refused and how, and how the budget is shared."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blend.errors import UnknownSelectorError
from blend.select import AUTO, NAMES, open_selector
from blend.select.combine import Combined, allot
from blend.select.deviation import Deviation
from blend.select.heads import Heads
from blend.select.layers import Layers
from blend.select.question import Question
from blend.select.random import RandomRows
from tests.blend.scene import SPECS


def opened(spec: str) -> Combined:
    selector = open_selector(spec)
    assert isinstance(selector, Combined)
    return selector


def test_a_spec_sets_every_option() -> None:
    spec = "question(layers=upper,pool=4,rounds=2,anchors=0.15,budget=chunks,threshold=.9)"
    assert opened(spec).parts == (Question(Layers("upper"), 4, 2, 0.15, "chunks", False, 0.9),)
    assert opened("question(fast=true)").parts == (Question(fast=True),)
    assert opened("deviation(check=1|3,filter=gradual,on=v)").parts == (Deviation(Layers("1|3"), "gradual", "v"),)
    assert opened("random(seed=7)").parts == (RandomRows(7),)


def test_parts_stand_in_order_with_their_shares() -> None:
    both = opened(" heads ( rows = 2 ) : 0.2 + question : .8 ")
    assert both.parts == (Heads(2), Question())
    assert both.shares == (Fraction(1, 5), Fraction(4, 5))
    assert both.name == "heads(rows=2):0.2+question:0.8"
    assert opened("heads:0.000001+question:.999999").name == "heads:0.000001+question:0.999999"
    assert opened("heads:1.0").name == "heads:1"


def test_auto_is_a_spec_under_another_name() -> None:
    auto = opened("auto")
    assert auto.name == "auto"
    assert (auto.parts, auto.shares) == (opened(AUTO).parts, opened(AUTO).shares)


@pytest.mark.parametrize("spec", [*NAMES, *SPECS])
def test_the_name_of_a_selector_is_its_spec(spec: str) -> None:
    assert open_selector(spec).name == spec
    assert open_selector(open_selector(spec).name) == open_selector(spec) or spec in ("none", "all")


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("best", r"'best' is unknown; choose one of auto, none, all, deviation, heads, question, random, oracle"),
        ("heads+best(x=1)", r"'best' is unknown; choose"),
        ("", r"'' is unknown; choose"),
        ("heads+", r"'' is unknown; choose"),
        ("HEADS", r"'HEADS' is unknown; choose"),
        ("heads(rows=1", r"'heads\(rows=1' cannot be read; a part is name"),
        ("heads rows=1", r"cannot be read"),
        ("heads(rows)", r"the option 'rows'; a part is name"),
        ("heads(rows=)", r"the option 'rows='"),
        ("heads(rows=1,)", r"the option ''"),
        ("heads(rows=1,rows=2)", r"the option 'rows' twice"),
        ("heads(row=1)", r"'heads' has no option 'row'; it takes rows"),
        ("heads(rows=0)", r"cannot have rows=0; give a whole number from 1 to 4096"),
        ("heads(rows=1e3)", r"rows=1e3; give a whole number"),
        ("heads(rows=²)", r"rows=²; give a whole number"),
        ("question(pool=-1)", r"pool=-1"),
        ("question(rounds=3)", r"rounds=3; give a whole number from 1 to 2"),
        ("question(fast=yes)", r"fast=yes; choose true or false"),
        ("question(anchors=0)", r"anchors=0; give a number above 0, at most 1"),
        ("question(threshold=nan)", r"threshold=nan"),
        ("question(budget=rows)", r"budget=rows; choose global or chunks"),
        ("question(layers=top)", r"layers=top; choose all, upper, lower, last, or layers from 0"),
        ("question(layers=4-2)", r"layers=4-2"),
        ("question(layers=1||2)", r"layers=1"),
        ("question(fast=true,layers=1)", r"fast=true asks the last layer once"),
        ("question(fast=true,rounds=2)", r"leave layers and rounds out"),
        ("deviation(check=all)", r"check=all; give layers from 0"),
        ("deviation(filter=slow)", r"filter=slow; choose once or gradual"),
        ("deviation(filter=gradual)+question", r"'deviation\(filter=gradual\)' must be the last"),
        ("oracle(by=luck)", r"by=luck; choose deviation or attention"),
        ("auto+heads", r"'auto' stands alone"),
        ("heads+all", r"'all' stands alone"),
        ("none:0.5", r"'none' stands alone"),
        ("auto(x=1)", r"'auto' stands alone"),
        ("heads:0", r"the share 0; give one above 0, at most 1"),
        ("heads:1.01", r"the share 1.01"),
        ("heads:0.1234567", r"at most 6 decimals"),
        ("heads:1.2.3", r"the share 1.2.3"),
        ("heads:1.", r"the share 1."),
        ("heads:-1", r"cannot be read"),
        ("heads:0.6+question:0.6", r"add up to 1.2"),
        ("heads+heads+heads+heads+heads", r"5 parts; a spec has 4 at most"),
        ("heads+" * 500, r"has 3000 characters; a spec has 200 at most"),
    ],
)
def test_a_bad_spec_is_told_what_is_wrong(spec: str, told: str) -> None:
    with pytest.raises(UnknownSelectorError, match=told) as caught:
        open_selector(spec)
    assert len(str(caught.value)) < 600


@given(st.text(alphabet="adehiknoqrstu()=,:+.|-019 \n²٣", max_size=220) | st.text())
def test_any_text_is_a_selector_or_a_clear_error(text: str) -> None:
    try:
        name = open_selector(text).name
    except UnknownSelectorError:
        return
    assert open_selector(name).name == name


def test_layers_beyond_the_model_are_refused_where_the_model_is_known() -> None:
    for spec in ("question(layers=2-9)", "heads+deviation(check=1|6)"):
        open_selector(spec)
        open_selector(spec, layers=10)
        with pytest.raises(UnknownSelectorError, match="the model has layers 0 to 5"):
            open_selector(spec, layers=6)
    for spec in NAMES:
        open_selector(spec, layers=1)


@pytest.mark.parametrize(
    ("text", "of"),
    [
        ("all", {0, 1, 2, 3, 4}),
        ("upper", {2, 3, 4}),
        ("lower", {0, 1}),
        ("last", {4}),
        ("3", {3}),
        ("1-3", {1, 2, 3}),
        ("0|2-3", {0, 2, 3}),
    ],
)
def test_layers(text: str, of: set[int]) -> None:
    assert Layers(text).of(5) == of
    assert Layers(text).of(1) <= {0}


def test_upper_and_lower_are_all_layers() -> None:
    for n in range(2, 9):
        assert Layers("upper").of(n) | Layers("lower").of(n) == Layers("all").of(n)
        assert not Layers("upper").of(n) & Layers("lower").of(n)


@pytest.mark.parametrize(
    ("shares", "spends", "allotted"),
    [
        ((None,), (0,), [100]),
        ((None, None), (5, 95), [50, 95]),  # what heads(rows=1) leaves is the question's
        (("0.2", "0.8"), (20, 80), [20, 80]),
        (("0.2", "0.8"), (5, 80), [20, 80]),  # a share is a share, whatever the others left
        (("0.2", None), (5, 95), [20, 95]),
        ((None, "0.8"), (20, 80), [20, 80]),
        ((None, "0.5", None), (0, 50, 50), [25, 50, 50]),
        (("0.1",), (10,), [10]),
    ],
)
def test_shares_of_a_hundred_rows(shares: tuple[str | None, ...], spends: tuple[int, ...], allotted: list[int]) -> None:
    given_ = [None if s is None else Fraction(s) for s in shares]
    assert [allot(given_, i, 100, sum(spends[:i])) for i in range(len(given_))] == allotted


@given(st.lists(st.integers(1, 100) | st.none(), min_size=1, max_size=4), st.integers(0, 1000), st.data())
def test_parts_never_get_more_than_the_budget(percents: list[int | None], budget: int, data: st.DataObject) -> None:
    total = sum(p or 0 for p in percents)
    shares = [None if p is None else Fraction(p, max(100, total)) for p in percents]
    spent = 0
    for i in range(len(shares)):
        most = allot(shares, i, budget, spent)
        assert 0 <= most <= budget - spent
        spent += data.draw(st.integers(0, most))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(0, 1000))
def test_shares_of_one_in_all_spend_the_whole_budget(weights: list[int], budget: int) -> None:
    shares = [Fraction(w, sum(weights)) for w in weights]
    spent = 0
    for i in range(len(shares)):
        spent += allot(shares, i, budget, spent)
    assert spent == budget
