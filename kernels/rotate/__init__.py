"""Move keys to other positions by rotating them further."""

from kernels.rotate.reference import rotate

__all__ = ["rotate"]
