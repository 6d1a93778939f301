"""``none``: recompute nothing (naive reuse, Prompt Cache arXiv 2311.04934); the lower control."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blend.select.base import Selection, no_rows

if TYPE_CHECKING:
    from blend.method import Blend


class NoRows:
    """Selects nothing."""

    name = "none"

    def select(self, state: Blend) -> Selection:
        return Selection(no_rows())
