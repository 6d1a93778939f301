"""Choose: the codec a chunk is worth most in, after AdaptCache (arXiv 2509.00105) and EVICPRESS (2512.14946)."""

from __future__ import annotations

from dataclasses import dataclass

from store.codec import CODECS, Codec
from store.codec.figures import FIGURES, Figures
from store.types import KVLayout


@dataclass(frozen=True)
class Prices:
    """What a tier and its users care for.

    ``read_bytes_s``: bytes that the tier delivers in a second to one reader. ``pressure``: 0 where there is room for
    everything, 1 where every byte kept drives another one out. ``typical``: how often the entries that would go are
    used. ``point``: the part of what a use saves that one point of answer quality is worth (0.2: at a loss of 5 points
    reuse is worth nothing).
    """

    read_bytes_s: float = 2e9
    pressure: float = 0.0
    typical: float = 1.0
    point: float = 0.2

    def __post_init__(self) -> None:
        if self.read_bytes_s <= 0:
            raise ValueError(f"read_bytes_s must be positive, not {self.read_bytes_s}")
        if not 0.0 <= self.pressure <= 1.0:
            raise ValueError(f"pressure must be within 0..1, not {self.pressure}")
        if self.typical < 0 or self.point < 0:
            raise ValueError(f"typical and point must not be negative, not {self.typical} and {self.point}")


def choose_codec(
    *, tokens: int, layout: KVLayout, frequency: float, saved_s_per_token: float, prices: Prices | None = None
) -> Codec:
    """The codec of highest ``utility`` for a chunk of ``tokens``; of equals the least lossy.

    ``frequency``: uses to expect while it is kept, on the scale of ``prices.typical``. ``saved_s_per_token``: seconds
    of prefill that a use saves for every token. Raises ``ValueError`` if one is negative.
    """
    if tokens < 0 or frequency < 0 or saved_s_per_token < 0:
        raise ValueError(
            f"tokens, frequency and saved_s_per_token must not be negative, not "
            f"{tokens}, {frequency} and {saved_s_per_token}"
        )

    def worth(codec: Codec) -> tuple[float, float]:
        size, figures = layout.layers * codec.plane_bytes(layout, tokens), FIGURES[codec.name]
        value = utility(
            figures,
            size=size,
            values=tokens * layout.token_bytes // layout.torch_dtype.itemsize,
            raw_bytes=tokens * layout.token_bytes,
            frequency=frequency,
            saved_s=tokens * saved_s_per_token,
            prices=prices or Prices(),
        )
        return value, -figures.loss

    return max(CODECS.values(), key=worth)


def utility(
    figures: Figures,
    *,
    size: int,
    values: int,
    raw_bytes: int,
    frequency: float,
    saved_s: float,
    prices: Prices,
) -> float:
    """Seconds gained by keeping a chunk in a codec::

        frequency x (saved_s x (1 - point x loss) - size / read_bytes_s - values / decode)
          - pressure x typical x saved_s x size / raw_bytes

    The first line is what its uses bring: prefill seconds saved, less what wrong answers cost, less the seconds until
    the KV is there (a use that would take longer to load than to compute brings nothing, it is computed). The second
    is the rent: what the entries would bring, raw, that lie where it lies. So a chunk that is used much is kept in what
    loads fastest, one that is used little in what is smallest, and without pressure only loading counts: raw, unless
    the tier is so slow that decoding is faster than reading.
    """
    wait = size / prices.read_bytes_s + values / figures.decode
    gain = max(0.0, saved_s * (1.0 - prices.point * figures.loss) - wait)
    rent = prices.pressure * prices.typical * saved_s * size / max(1, raw_bytes)
    return frequency * gain - rent
