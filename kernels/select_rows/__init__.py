"""Choose the rows to recompute, and cut them into contiguous runs."""

from kernels.select_rows.reference import rows_covering, runs, select_rows

__all__ = ["rows_covering", "runs", "select_rows"]
