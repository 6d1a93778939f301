"""Errors of the store. A miss is not an error: it is a ``Miss`` with its reason."""

from __future__ import annotations


class StoreError(Exception):
    """Base of everything this room raises."""


class StoreFullError(StoreError):
    """No room left on the device or under the configured limit; nothing of the entry was written."""


class StoreIOError(StoreError):
    """The device or the database failed; the message has the path and the cause."""


class StoreFormatError(StoreError):
    """The folder holds a store of another format version or of another program."""
