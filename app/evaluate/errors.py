"""The error of this package."""

from __future__ import annotations


class EvaluationError(Exception):
    """The evaluation cannot go on; the message says why."""
