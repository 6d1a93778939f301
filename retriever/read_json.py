"""JSON and JSON lines -> documents. An object needs its text under "text", "content" or "body"."""

import json
from collections.abc import Iterator

from retriever.clean import clean
from retriever.errors import UnreadableDocumentError
from retriever.item import Item
from retriever.metadata import clean_metadata, is_scalar
from retriever.types import Scalar

_TEXT_KEYS = ("text", "content", "body")
_OWN_KEYS = {*_TEXT_KEYS, "title", "id", "metadata"}


def read_json(text: str, name: str) -> list[Item]:
    """One object, an array of objects or strings, or {"documents": [...]}."""
    value = _loads(text, name)
    if isinstance(value, dict) and isinstance(value.get("documents"), list):
        value = value["documents"]
    values = value if isinstance(value, list) else [value]
    many = len(values) > 1
    return [_item(entry, f"{name}[{index}]" if many else name) for index, entry in enumerate(values)]


def read_jsonl(text: str, name: str) -> list[Item]:
    """One object or string per line; blank lines are skipped."""
    # Not splitlines(): U+2028 may stand inside a JSON string.
    lines: Iterator[tuple[int, str]] = enumerate(text.split("\n"), start=1)
    return [_item(_loads(line, f"{name} line {n}"), f"{name} line {n}") for n, line in lines if line.strip()]


def _loads(text: str, where: str) -> object:
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise UnreadableDocumentError(
            f"{where}: not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise UnreadableDocumentError(f"{where}: not usable JSON: {error}") from error
    except RecursionError as error:
        raise UnreadableDocumentError(f"{where}: JSON nested too deeply") from error
    return value


def _item(value: object, where: str) -> Item:
    if isinstance(value, str):
        return Item(text=clean(value).strip("\n"), raw=value.encode("utf-8", "surrogatepass"))
    if not isinstance(value, dict):
        raise UnreadableDocumentError(f"{where}: a document is an object or a string, not {type(value).__name__}")
    key = next((key for key in _TEXT_KEYS if key in value), None)
    if key is None or not isinstance(value[key], str):
        found = ", ".join(sorted(map(str, value))[:8]) or "nothing"
        raise UnreadableDocumentError(f'{where}: no string under "text", "content" or "body" (found: {found})')
    title, own_id = value.get("title"), value.get("id")
    return Item(
        text=clean(value[key]).strip("\n"),
        raw=json.dumps(value, sort_keys=True, separators=(",", ":")).encode(),
        title=title if isinstance(title, str) else None,
        id=str(own_id) if isinstance(own_id, str | int) and not isinstance(own_id, bool) else None,
        metadata=_metadata(value, where),
    )


def _metadata(value: dict[str, object], where: str) -> dict[str, Scalar]:
    """The object under "metadata", and every other scalar beside the text: it may be wanted in a filter."""
    given = value.get("metadata")
    if given is not None and not isinstance(given, dict):
        raise UnreadableDocumentError(f'{where}: "metadata" must be an object of strings, numbers and booleans')
    beside = {key: entry for key, entry in value.items() if key not in _OWN_KEYS and is_scalar(entry)}
    return clean_metadata({**beside, **(given or {})}, where)
