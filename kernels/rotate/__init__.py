"""Move keys to other positions by rotating them further."""

from kernels.rotate.reference import angles, rotate, rotate_

__all__ = ["angles", "rotate", "rotate_"]
