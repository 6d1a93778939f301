"""How far stored keys and values are from fresh ones."""

from kernels.deviation.reference import deviation

__all__ = ["deviation"]
