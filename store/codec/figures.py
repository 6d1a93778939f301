"""What was measured of each codec: the table that ``choose_codec`` goes by.

Made by ``scripts/study_codecs.py`` (``speed --questions 4`` for the rates, ``quality`` and ``table`` for the loss; the
demo model, 2026-11-21, docs/codecs.md). Sizes are not here: ``Codec.plane_bytes`` knows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """``decode``: values of K and V that one core decodes in a second, checksum included; of 1 MiB bfloat16 planes.

    ``loss``: points of answer quality, not the measured difference (there is none for most) but what cannot be ruled
    out: the mean bound on the change of the first token's probabilities, by its divergence (Pinsker's inequality).
    """

    decode: float
    loss: float


FIGURES: Mapping[str, Figures] = {
    "raw": Figures(decode=6.0e9, loss=0.0),
    "fp8": Figures(decode=1.0e9, loss=0.34),
    "int8": Figures(decode=1.3e9, loss=0.05),
    "int4": Figures(decode=1.1e9, loss=0.41),
    "entropy": Figures(decode=0.55e9, loss=0.41),
    "entropy-coarse": Figures(decode=0.5e9, loss=1.5),
}
