"""Attention of scattered query rows, causal by position."""

from kernels.row_attention.reference import row_attention

__all__ = ["row_attention"]
