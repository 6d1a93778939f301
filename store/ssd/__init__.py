"""The store on disk: append-only segment files, and LMDB as their index."""

from __future__ import annotations

from store.ssd.database import DamagedError
from store.ssd.files import Files
from store.ssd.folder import LostIndexError
from store.ssd.rebuild import put_aside
from store.ssd.store import SsdStore

__all__ = ["DamagedError", "Files", "LostIndexError", "SsdStore", "put_aside"]
