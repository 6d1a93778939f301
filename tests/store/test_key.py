"""Two chunks share a key only if they are the same chunk of the same tenant."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store import KVLayout, context_hash, make_key, source_of
from store.types import KVKey

LAYOUT = KVLayout(model="ab", layers=2, heads=2, head_dim=8, dtype="float32", rope="cd")
BASE = {
    "layout": LAYOUT,
    "tokenizer": "ef",
    "tenant_salt": b"s" * 32,
    "context": b"c" * 32,
    "token_ids": (1, 2, 3),
}

salts = st.binary(min_size=32, max_size=32)
ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20).map(tuple)


def key(**changes: object) -> KVKey:
    return make_key(**{**BASE, **changes})  # type: ignore[arg-type]


def test_the_same_input_gives_the_same_key_for_ever() -> None:
    # A change of this value orphans every store in the field: raise FORMAT_VERSION with it.
    assert key().hex == "89972e3a40317cc79ecdf30d6ac5d472d3bbdc733ef5622a76f51792d2ce683b"
    assert key() == key(token_ids=[1, 2, 3])


def test_every_field_changes_the_key() -> None:
    other: dict[str, Any] = {
        "model": "99",
        "layers": 3,
        "heads": 3,
        "head_dim": 16,
        "dtype": "float16",
        "rope": "9",
    }
    assert set(other) == {f.name for f in fields(LAYOUT)}
    layouts = [replace(LAYOUT, **{name: value}) for name, value in other.items()]
    keys = [key(layout=layout) for layout in layouts] + [
        key(),
        key(tokenizer="e"),
        key(tenant_salt=b"t" * 32),
        key(context=b"d" * 32),
        key(token_ids=(1, 2)),
        key(token_ids=(1, 2, 3, 0)),
        key(token_ids=(1, 3, 2)),
    ]
    assert len(set(keys)) == len(layouts) + 7


@given(salts, salts, ids, st.text(), st.binary(min_size=32, max_size=32))
def test_two_tenants_never_share_a_key_or_a_source(
    a: bytes, b: bytes, token_ids: tuple[int, ...], tokenizer: str, context: bytes
) -> None:
    mine, theirs = (key(tenant_salt=salt, token_ids=token_ids, tokenizer=tokenizer, context=context) for salt in (a, b))
    assert (mine == theirs) == (a == b)
    assert (source_of(a, tokenizer) == source_of(b, tokenizer)) == (a == b)


@given(ids, ids, st.text(), st.text())
def test_different_texts_or_tokenizers_never_share_a_key(
    a: tuple[int, ...], b: tuple[int, ...], one: str, two: str
) -> None:
    equal = (a, one) == (b, two)
    assert (key(token_ids=a, tokenizer=one) == key(token_ids=b, tokenizer=two)) == equal
    assert (context_hash(a) == context_hash(b)) == (a == b)
    assert (source_of(b"s" * 32, one) == source_of(b"s" * 32, two)) == (one == two)


def test_bytes_cannot_move_between_fields() -> None:
    # Without length prefixes "ab" + ... and "a" + "b" + ... would encode alike.
    tail = (0x62).to_bytes(4, "little")
    assert key(tokenizer="a", token_ids=()) != key(tokenizer="a" + tail.decode(), token_ids=())
    assert len(context_hash(())) == len(source_of(b"s" * 32, "")) == 32


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"tenant_salt": b""}, "not 0"),
        ({"tenant_salt": b"s" * 33}, "not 33"),
        ({"context": b"c"}, "not 1"),
        ({"token_ids": (2**31,)}, "2147483648"),
    ],
)
def test_a_bad_field_is_shown(changes: dict[str, object], shown: str) -> None:
    with pytest.raises(ValueError, match=shown):
        key(**changes)
