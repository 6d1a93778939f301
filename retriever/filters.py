"""OpenAI file_search filters over document metadata."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from retriever.errors import FilterError
from retriever.types import DocumentInfo, Scalar

Predicate = Callable[[DocumentInfo], bool]

MAX_DEPTH = 4
MAX_LEAVES = 32
MAX_VALUES = 256
_ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "gt": lambda a, b: a > b,
    "gte": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "lte": lambda a, b: a <= b,
}
_COMPARISONS = ("eq", "ne", *_ORDERED, "in", "nin")


def compile_filter(filters: Mapping[str, Any] | None) -> Predicate | None:
    """A filter as a predicate over documents; None stays None. `FilterError` says what is wrong and where.

    `{"type": "eq|ne|gt|gte|lt|lte|in|nin", "key", "value"}` or `{"type": "and|or", "filters": [...]}`. Keys are
    metadata keys; `document_id`, `filename`, `title` and `media_type` work where the metadata has no such key. A
    document without the key matches only `ne` and `nin`. Values of different kinds (text, number, boolean) are
    never equal and never ordered.
    """
    if filters is None:
        return None
    budget = [MAX_LEAVES]
    return _node(filters, "filters", 1, budget)


def _node(node: object, where: str, depth: int, budget: list[int]) -> Predicate:
    if not isinstance(node, Mapping):
        raise FilterError(f"{where}: must be an object, not {type(node).__name__}")
    kind = node.get("type")
    if kind in ("and", "or"):
        return _compound(node, where, depth, budget)
    if not isinstance(kind, str) or kind not in _COMPARISONS:
        raise FilterError(f"{where}.type: {kind!r} is not one of {', '.join((*_COMPARISONS, 'and', 'or'))}")
    budget[0] -= 1
    if budget[0] < 0:
        raise FilterError(f"{where}: more than {MAX_LEAVES} comparisons")
    return _comparison(node, kind, where)


def _compound(node: Mapping[str, Any], where: str, depth: int, budget: list[int]) -> Predicate:
    if depth >= MAX_DEPTH:
        raise FilterError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    _only(node, {"type", "filters"}, where)
    children = node.get("filters")
    if not isinstance(children, list) or not children:
        raise FilterError(f"{where}.filters: must be a non-empty list")
    parts = [_node(child, f"{where}.filters[{at}]", depth + 1, budget) for at, child in enumerate(children)]
    if node["type"] == "and":
        return lambda document: all(part(document) for part in parts)
    return lambda document: any(part(document) for part in parts)


def _comparison(node: Mapping[str, Any], kind: str, where: str) -> Predicate:
    _only(node, {"type", "key", "value"}, where)
    key, value = node.get("key"), node.get("value")
    if not isinstance(key, str) or not key:
        raise FilterError(f"{where}.key: must be a metadata key, not {key!r}")
    if kind in ("in", "nin"):
        if not isinstance(value, list) or not 0 < len(value) <= MAX_VALUES:
            raise FilterError(f"{where}.value: {kind!r} needs a list of 1 to {MAX_VALUES} values")
        values = [_scalar(entry, f"{where}.value[{at}]") for at, entry in enumerate(value)]
        wanted = kind == "in"
        return lambda document: any(_equal(_value(document, key), entry) for entry in values) == wanted
    expected = _scalar(value, f"{where}.value")
    if kind in ("eq", "ne"):
        equal = kind == "eq"
        return lambda document: _equal(_value(document, key), expected) == equal
    if isinstance(expected, bool):
        raise FilterError(f"{where}.value: {kind!r} needs a number or a string, not a boolean")
    compare = _ORDERED[kind]

    def ordered(document: DocumentInfo) -> bool:
        found = _value(document, key)
        return found is not None and _kind(found) == _kind(expected) and compare(found, expected)

    return ordered


def _only(node: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(str(key) for key in node if key not in known)
    if unknown:
        raise FilterError(f"{where}: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _scalar(value: object, where: str) -> Scalar:
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise FilterError(f"{where}: must be a string, a finite number or a boolean, not {value!r}")
    return value


def _value(document: DocumentInfo, key: str) -> Scalar | None:
    if key in document.metadata:
        return document.metadata[key]
    own = {
        "document_id": document.id,
        "filename": document.filename,
        "title": document.title,
        "media_type": document.media_type,
    }
    return own.get(key)


def _equal(a: Scalar | None, b: Scalar) -> bool:
    return a is not None and _kind(a) == _kind(b) and a == b


def _kind(value: Scalar) -> str:
    return "boolean" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"
