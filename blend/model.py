"""The seam between the method and a model: what an engine's adapter must offer for one request.

L layers, Hq query heads, H key-value heads, D head dimension, R rows. Rows are prompt positions, sorted ascending.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from blend.rope import Rope
from store.types import KVLayout


class Observed(NamedTuple):
    """What one layer's attention saw, after RoPE: ``q`` [R, Hq, D], ``k`` and ``v`` [R, H, D]."""

    q: Tensor
    k: Tensor
    v: Tensor


class BlendModel(Protocol):
    """A model whose decoder layers can be run on chosen rows of one request's cache.

    ``scale`` is the attention's logit scale. A step made by ``prepare`` may be used for every layer; it holds what
    depends on the rows only (runs, block tables), so that a layer costs no bookkeeping.
    """

    layout: KVLayout
    rope: Rope
    scale: float

    def prepare(self, rows: Tensor) -> Any:
        """A step for ``rows`` [R] int64."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """[R] int64 -> hidden [R, d_model] in the model's dtype."""
        ...

    def write_kv(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Put ``k``, ``v`` [R, H, D], already rotated for ``rows``, into the cache."""
        ...

    def forward_layer(self, layer: int, hidden: Tensor, step: Any) -> Tensor:
        """Rows through one decoder layer: [R, d_model] -> [R, d_model].

        Writes the rows' fresh KV first; each row then attends, causally by position, to every row up to itself.
        """
        ...

    def observe(self) -> Observed:
        """What the last ``forward_layer`` saw."""
        ...
