"""The choice of a codec moves the right way in each of the things it weighs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.codec import CODECS
from store.codec.choose import Prices, choose_codec, utility
from store.codec.figures import FIGURES, Figures
from store.types import KVLayout

LAYOUT = KVLayout(model="ab", layers=32, heads=8, head_dim=128, dtype="bfloat16", rope="cd")
CHUNK = {"tokens": 256, "layout": LAYOUT, "frequency": 1.0, "saved_s_per_token": 1e-3}
FULL = Prices(pressure=1.0)


def size(name: str) -> int:
    return CODECS[name].plane_bytes(LAYOUT, 256)


def chosen(prices: Prices, **changes: float) -> str:
    return choose_codec(**{**CHUNK, **changes}, prices=prices).name  # type: ignore[arg-type]


def test_every_codec_has_figures_and_the_lossless_one_loses_nothing() -> None:
    assert set(FIGURES) == set(CODECS)
    for name, codec in CODECS.items():
        assert FIGURES[name].decode > 0 and (FIGURES[name].loss == 0.0) == codec.lossless


def test_with_room_and_a_fast_tier_nothing_is_given_up() -> None:
    assert chosen(Prices(read_bytes_s=20e9)) == "raw"


def test_a_tier_slower_than_decoding_is_read_compressed() -> None:
    # The slower the tier, the smaller: waiting for bytes is all there is to lose.
    rates = (20e9, 1e9, 0.1e9, 20e6)
    sizes = [size(chosen(Prices(read_bytes_s=rate), saved_s_per_token=0.01)) for rate in rates]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] / 3


def test_the_fuller_the_tier_the_smaller_the_codec() -> None:
    sizes = [size(chosen(Prices(read_bytes_s=20e9, pressure=p))) for p in (0.0, 0.25, 0.5, 1.0)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] / 3


def test_the_more_a_chunk_is_used_the_less_it_is_squeezed() -> None:
    sizes = [size(chosen(replace(FULL, read_bytes_s=20e9), frequency=f)) for f in (0.1, 1, 10, 100, 10_000)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] / 3
    assert chosen(replace(FULL, read_bytes_s=20e9), frequency=10_000) == "raw"


def test_rent_follows_what_the_others_are_used() -> None:
    rare, often = (size(chosen(replace(FULL, read_bytes_s=20e9, typical=t), frequency=10)) for t in (0.01, 100.0))
    assert often < rare


def test_who_cares_more_for_quality_gets_a_less_lossy_codec() -> None:
    losses = [FIGURES[chosen(replace(FULL, point=p))].loss for p in (0.0, 0.2, 1.0, 10.0, 1000.0)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1] == 0.0


def test_when_computing_is_as_fast_as_reading_reuse_is_worth_nothing_and_the_rent_decides() -> None:
    assert size(chosen(FULL, saved_s_per_token=1e-9)) == min(size(name) for name in CODECS)


def test_of_equals_the_least_lossy_is_taken() -> None:
    assert chosen(Prices(), frequency=0.0) == "raw"
    assert choose_codec(tokens=0, layout=LAYOUT, frequency=1.0, saved_s_per_token=1.0).name == "raw"


amounts = st.floats(1e-3, 1e3)


@given(
    frequency=amounts,
    saved=amounts,
    loss=st.floats(0, 4),
    decode=st.floats(1e7, 1e10),
    size=st.integers(1, 1 << 30),
    pressure=st.floats(0, 1),
    rate=st.floats(1e6, 1e11),
    more=st.floats(1.01, 10),
)
def test_utility_rises_and_falls_as_it_says(
    frequency: float, saved: float, loss: float, decode: float, size: int, pressure: float, rate: float, more: float
) -> None:
    figures, prices = Figures(decode, loss), Prices(read_bytes_s=rate, pressure=pressure)
    base = {"size": size, "values": 1 << 29, "raw_bytes": 1 << 30, "frequency": frequency, "saved_s": saved}

    def value(figures: Figures = figures, prices: Prices = prices, **changes: float) -> float:
        return utility(figures, **{**base, **changes}, prices=prices)  # type: ignore[arg-type]

    now = value()
    assert value(frequency=frequency * more) >= now
    assert value(figures=Figures(decode * more, loss)) >= now
    assert value(figures=Figures(decode, loss * more)) <= now
    assert value(size=int(size * more) + 1) <= now
    assert value(prices=replace(prices, read_bytes_s=rate * more)) >= now
    assert value(prices=replace(prices, pressure=pressure / more)) >= now
    assert value(prices=replace(prices, point=prices.point * more)) <= now
    assert value(prices=replace(prices, typical=more)) <= now


@pytest.mark.parametrize("wrong", [{"tokens": -1}, {"frequency": -0.5}, {"saved_s_per_token": -1.0}])
def test_negative_amounts_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        chosen(Prices(), **wrong)


@pytest.mark.parametrize("wrong", [{"pressure": 1.5}, {"pressure": -0.1}, {"read_bytes_s": 0.0}, {"typical": -1.0}])
def test_prices_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Prices(**wrong)
