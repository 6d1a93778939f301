"""How much attention each key receives."""

from kernels.attention_mass.reference import attention_mass

__all__ = ["attention_mass"]
