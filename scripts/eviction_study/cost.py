"""What a chunk takes and what it saves: the cost model of the study."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CostModel:
    """A model of 8 billion parameters (32 layers, 8 key-value heads of 128, bf16) on one data-centre GPU.

    Prefill of T tokens: ``2 P T`` FLOP for the weights and ``2 L d T^2`` for causal attention over ``compute`` FLOP/s;
    loading: the stored bytes over ``bandwidth`` bytes/s. Defaults: 400 TFLOP/s (40 % of a H100's dense bf16), 4.8 GB/s.
    """

    parameters: float = 8.0e9
    layers: int = 32
    width: int = 4096
    token_bytes: int = 2 * 32 * 8 * 128 * 2
    compute: float = 400e12
    bandwidth: float = 4.8e9

    def prefill_s(self, tokens: int) -> float:
        return (2 * self.parameters * tokens + 2 * self.layers * self.width * tokens**2) / self.compute

    def stored_bytes(self, tokens: int, ratio: float = 1.0) -> int:
        """``ratio``: times smaller than bf16, the codec's."""
        return int(tokens * self.token_bytes / ratio)

    def saved_s(self, tokens: int, stored: int) -> float:
        """Seconds that a hit saves: never less than nothing, or it would not be loaded."""
        return max(0.0, self.prefill_s(tokens) - stored / self.bandwidth)
