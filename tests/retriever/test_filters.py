"""compile_filter: OpenAI's file_search filters, strictly read."""

from typing import Any

import pytest

from retriever.errors import FilterError
from retriever.filters import MAX_LEAVES, compile_filter
from retriever.types import DocumentInfo


def info(**metadata: str | float | bool) -> DocumentInfo:
    return DocumentInfo("doc-1", "default", "Title", "file.txt", "text/plain", "0", metadata, 1, 1, 0.0)


def matches(filters: dict[str, Any], **metadata: str | float | bool) -> bool:
    predicate = compile_filter(filters)
    assert predicate is not None
    return predicate(info(**metadata))


def leaf(kind: str, value: object, key: str = "year") -> dict[str, object]:
    return {"type": kind, "key": key, "value": value}


def test_no_filter_is_no_filter() -> None:
    assert compile_filter(None) is None


@pytest.mark.parametrize(
    ("kind", "value", "below", "equal", "above"),
    [
        ("eq", 5, False, True, False),
        ("ne", 5, True, False, True),
        ("gt", 5, False, False, True),
        ("gte", 5, False, True, True),
        ("lt", 5, True, False, False),
        ("lte", 5, True, True, False),
        ("in", [5, 6], False, True, True),
        ("nin", [5, 6], True, False, False),
    ],
)
def test_every_comparison(kind: str, value: object, below: bool, equal: bool, above: bool) -> None:
    assert [matches(leaf(kind, value), year=year) for year in (4, 5.0, 6)] == [below, equal, above]


def test_text_numbers_and_booleans_are_never_equal_or_ordered() -> None:
    assert not matches(leaf("eq", 1), year=True)
    assert not matches(leaf("eq", "1"), year=1)
    assert matches(leaf("ne", "1"), year=1)
    assert not matches(leaf("gt", "0"), year=1)
    assert matches(leaf("gt", "2020-01-01"), year="2021-05-05")


def test_a_missing_key_matches_only_ne_and_nin() -> None:
    found = {kind: matches(leaf(kind, 5)) for kind in ("eq", "ne", "gt", "gte", "lt", "lte")}
    found |= {kind: matches(leaf(kind, [5])) for kind in ("in", "nin")}
    assert {kind for kind, match in found.items() if match} == {"ne", "nin"}


def test_the_document_s_own_fields_work_unless_metadata_has_the_key() -> None:
    assert matches(leaf("eq", "file.txt", "filename"))
    assert matches(leaf("in", ["doc-1"], "document_id"))
    assert not matches(leaf("eq", "file.txt", "filename"), filename="mine")


def test_and_or_nest() -> None:
    either = {"type": "or", "filters": [leaf("eq", 1), leaf("eq", 2)]}
    both = {"type": "and", "filters": [either, leaf("eq", "x", "kind")]}
    assert matches(both, year=2, kind="x")
    assert not matches(both, year=2, kind="y")
    assert not matches(both, year=3, kind="x")


def nested(depth: int) -> dict[str, Any]:
    return leaf("eq", 1) if depth == 1 else {"type": "and", "filters": [nested(depth - 1)]}


def test_depth_and_size_are_bounded() -> None:
    compile_filter(nested(4))
    with pytest.raises(FilterError, match="deeper than 4"):
        compile_filter(nested(5))
    compile_filter({"type": "or", "filters": [leaf("eq", 1)] * MAX_LEAVES})
    with pytest.raises(FilterError, match="more than 32 comparisons"):
        compile_filter({"type": "or", "filters": [leaf("eq", 1)] * (MAX_LEAVES + 1)})


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ([], "filters: must be an object, not list"),
        ({}, r"filters\.type: None is not one of eq, ne"),
        ({"type": ["eq"]}, "is not one of"),
        ({"type": "like", "key": "a", "value": 1}, "'like' is not one of"),
        (leaf("eq", 1, ""), r"filters\.key: must be a metadata key"),
        (leaf("eq", None), r"filters\.value: must be a string"),
        (leaf("eq", [1]), r"filters\.value: must be a string"),
        (leaf("eq", float("nan")), "finite"),
        (leaf("in", 1), "needs a list"),
        (leaf("in", []), "needs a list"),
        (leaf("in", [1, None]), r"filters\.value\[1\]"),
        (leaf("gt", True), "not a boolean"),
        (leaf("eq", 1) | {"extra": 1}, "unknown keys extra"),
        ({"type": "and", "filters": []}, "non-empty list"),
        ({"type": "or", "filters": [leaf("eq", 1), {"type": "x"}]}, r"filters\.filters\[1\]\.type"),
    ],
)
def test_a_malformed_filter_says_what_and_where(filters: Any, message: str) -> None:
    with pytest.raises(FilterError, match=message):
        compile_filter(filters)
