"""Errors of the store. A miss is not an error: it is a ``Miss`` with its reason."""

from __future__ import annotations

from store.types import MissReason


class StoreError(Exception):
    """Base of everything this room raises."""


class StoreFullError(StoreError):
    """No room left on the device or under the configured limit; nothing of the entry was written."""


class StoreIOError(StoreError):
    """The device or the database failed; the message has the path and the cause."""


class StoreFormatError(StoreError):
    """The folder holds a store of another format version or of another program."""


class CorruptEntryError(StoreError):
    """An entry's bytes are not what was written: the message says which. Stays inside the room."""


class LostError(StoreError):
    """An entry that was found cannot be read to its end; ``reason`` is what its reader reports as a miss."""

    def __init__(self, reason: MissReason, message: str) -> None:
        super().__init__(message)
        self.reason: MissReason = reason
