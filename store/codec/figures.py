"""What was measured of each codec: the table that ``choose_codec`` goes by.

Made by ``scripts/study_codecs.py`` (``speed --questions 4 --seconds 10`` for the rates, ``quality --questions 25`` and
``table`` for the loss; the demo model, 2026-11-21, docs/codecs.md). Sizes: ``Codec.plane_bytes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """``decode``: values of K and V that one core decodes in a second, in bfloat16 planes of 1 MiB. The checksum
    comes on top; it is ten times as fast as the fastest lossy codec.

    ``loss``: points of answer quality, not the measured difference (there is none for most) but what cannot be ruled
    out: the mean bound on the change of the first token's probabilities, by its divergence (Pinsker's inequality).
    """

    decode: float
    loss: float


FIGURES: Mapping[str, Figures] = {
    "raw": Figures(decode=14e9, loss=0.0),
    "fp8": Figures(decode=1.4e9, loss=0.19),
    "int8": Figures(decode=1.6e9, loss=0.04),
    "int4": Figures(decode=1.2e9, loss=0.50),
    "entropy": Figures(decode=0.76e9, loss=0.25),
    "entropy-coarse": Figures(decode=0.62e9, loss=0.73),
}
