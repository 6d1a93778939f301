"""The manifest of an export: what its files hold, and nothing in it is believed before it is checked.

``manifest.json``: ``format``, ``version``, ``store_format``, ``counts`` (entries, tokens, bytes), ``files`` (name,
bytes, sha256) and ``entries`` (key, layout, tokens, bytes, file, offset, length, header, sha256), in the order of the
files. The ``bytes`` of an entry are its planes'. At ``offset`` lie ``length`` bytes: its header (``header`` of them),
then its planes. Whoever demands the manifest's own SHA-256 has, by it, that of every byte of the export.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from store.errors import StoreFormatError
from store.types import FORMAT_VERSION, KVKey

NAME = "manifest.json"
FORMAT = "ragblend kv export"
VERSION = 1

# Names come from the manifest, that is, from anybody: no folders, no dots but this one, no links (see ``portable``).
_FILE = re.compile(r"chunks-[0-9]{5}\.kv")
_HASH = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 1 << 62


@dataclass(frozen=True)
class DataFile:
    """One data file: ``bytes`` long, ``sha256`` in hex."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Item:
    """One entry (the module's docstring says what the fields are); ``key`` and ``layout`` in hex."""

    key: str
    layout: str
    tokens: int
    bytes: int
    file: str
    offset: int
    length: int
    header: int
    sha256: str

    @property
    def kv_key(self) -> KVKey:
        return KVKey.from_hex(self.key)


@dataclass(frozen=True)
class Manifest:
    files: tuple[DataFile, ...]
    items: tuple[Item, ...]

    def to_bytes(self) -> bytes:
        text = json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "store_format": FORMAT_VERSION,
                "counts": self._counts(),
                "files": [asdict(file) for file in self.files],
                "entries": [asdict(item) for item in self.items],
            },
            indent=1,
        )
        return text.encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises ``StoreFormatError`` unless it is a manifest of this version, consistent in itself."""
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise StoreFormatError(f"{NAME} is not readable JSON: {error}") from error
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise StoreFormatError(f"{NAME} is not that of a KV export of ragblend")
        found = (fields.get("version"), fields.get("store_format"))
        if found != (VERSION, FORMAT_VERSION) or bool in map(type, found):  # True is 1
            raise StoreFormatError(
                f"the export has version {found[0]!r} of store format {found[1]!r}, this ragblend reads version "
                f"{VERSION} of store format {FORMAT_VERSION}: precompute the documents here instead"
            )
        _only(fields, "the manifest", "format version store_format counts files entries")
        files, items = fields["files"], fields["entries"]
        if not isinstance(files, list) or not isinstance(items, list):
            raise StoreFormatError(f"files and entries of {NAME} must be lists")
        manifest = cls(
            tuple(_parse(DataFile, x, f"files[{n}]") for n, x in enumerate(files)),
            tuple(_parse(Item, x, f"entries[{n}]") for n, x in enumerate(items)),
        )
        manifest._check()
        if fields["counts"] != manifest._counts():
            raise StoreFormatError(f"{NAME} counts {fields['counts']}, its entries are {manifest._counts()}")
        return manifest

    def _counts(self) -> dict[str, int]:
        return {
            "entries": len(self.items),
            "tokens": sum(item.tokens for item in self.items),
            "bytes": sum(item.bytes for item in self.items),
        }

    def _check(self) -> None:
        """Every entry once, within its file, after the one before it."""
        sizes = {file.name: file.bytes for file in self.files}
        if len(sizes) != len(self.files):
            raise StoreFormatError(f"{NAME} names a file twice")
        ends = dict.fromkeys(sizes, 0)
        seen: set[str] = set()
        for n, item in enumerate(self.items):
            if item.file not in sizes or item.offset < ends[item.file] or item.offset + item.length > sizes[item.file]:
                raise StoreFormatError(f"entries[{n}] of {NAME} does not lie in {item.file} behind the one before it")
            if not item.header <= item.length - item.bytes or item.key in seen:
                raise StoreFormatError(f"entries[{n}] of {NAME} contradicts itself or another one: {item}")
            ends[item.file] = item.offset + item.length
            seen.add(item.key)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _parse(kind: type[Any], fields: object, where: str) -> Any:
    names = kind.__dataclass_fields__
    _only(fields, where, " ".join(names))
    assert isinstance(fields, dict)
    for name, value in fields.items():
        wants_text = names[name].type == "str"
        if not (isinstance(value, str) if wants_text else type(value) is int and 0 <= value < _MAX_BYTES):
            raise StoreFormatError(f"{where}.{name} of {NAME} is {value!r}"[:300])
        pattern = _FILE if name in ("name", "file") else _HASH
        if wants_text and not pattern.fullmatch(value):
            raise StoreFormatError(f"{where}.{name} of {NAME} is {value!r}, not like {pattern.pattern}"[:300])
    return kind(**fields)


def _only(fields: object, where: str, names: str) -> None:
    wanted = set(names.split())
    if not isinstance(fields, Mapping) or set(fields) != wanted:
        found = sorted(map(str, fields)) if isinstance(fields, Mapping) else type(fields).__name__
        raise StoreFormatError(f"{where} of {NAME} must have {sorted(wanted)}, not {found}"[:500])
