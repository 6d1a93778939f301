"""Choose the rows to recompute, and cut them into contiguous runs."""

from kernels.select_rows.reference import runs, select_rows

__all__ = ["runs", "select_rows"]
