"""Codecs by name and version. An entry's header says which one wrote it."""

from __future__ import annotations

from collections.abc import Mapping

from store.codec.base import Bytes, Codec
from store.codec.entropy import Entropy
from store.codec.fp8 import Fp8
from store.codec.int4 import Int4
from store.codec.int8 import Int8
from store.codec.raw import Raw

__all__ = ["CODECS", "Bytes", "Codec", "open_codec"]

CODECS: Mapping[str, Codec] = {
    codec.name: codec
    for codec in (
        Raw(),
        Fp8(),
        Int8(),
        Int4(),
        Entropy("entropy", steps=(0.25,), bits=4.0),
        Entropy("entropy-coarse", steps=(0.67, 0.5, 0.375), bits=3.1),
    )
}


def open_codec(name: str) -> Codec:
    """The codec of that name. Raises ``ValueError`` with the choices."""
    try:
        return CODECS[name]
    except KeyError:
        raise ValueError(f"codec {name!r} is unknown; choose one of {', '.join(CODECS)}") from None
