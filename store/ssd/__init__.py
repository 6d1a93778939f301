"""The store on disk: append-only segment files, and LMDB as their index."""

from __future__ import annotations

from store.ssd.files import Files
from store.ssd.rebuild import put_aside
from store.ssd.store import SsdStore

__all__ = ["Files", "SsdStore", "put_aside"]
