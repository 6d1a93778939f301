"""chunk: exact offsets, never too long, nothing lost, boundaries where a reader would put them."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever.chunk import chunk
from retriever.parse import from_text, parse
from retriever.types import Document, Page

MARKDOWN_LIKE = st.lists(
    st.sampled_from(
        [
            "# Title",
            "word",
            "Dr. Who said so.",
            "It was! Was it?",
            "\n",
            "\n\n",
            " \n\n\n",
            "- item",
            "日本。語",
            "e" * 40,
        ]
    )
    | st.text(max_size=20),
    max_size=40,
).map(" ".join)


def count_words(text: str) -> int:
    return len(text.split())


def count_fours(text: str) -> int:
    """Like a byte-level tokenizer on odd text: nothing to do with words."""
    return (len(text) + 3) // 4


@settings(max_examples=200, deadline=None)
@given(text=MARKDOWN_LIKE.filter(str.strip), limit=st.integers(1, 30), words=st.booleans(), markdown=st.booleans())
def test_chunks_are_exact_in_order_small_enough_and_lose_nothing(
    text: str, limit: int, words: bool, markdown: bool
) -> None:
    document = Document("d", "t", text, "f", "text/markdown" if markdown else "text/plain", "0", {})
    count = count_words if words else count_fours
    chunks = chunk(document, count, chunk_tokens=limit)
    position = 0
    for ordinal, piece in enumerate(chunks):
        assert piece.ordinal == ordinal
        assert document.text[piece.start : piece.stop] == piece.text
        assert piece.text == piece.text.strip() != ""
        assert count(piece.text) <= limit
        assert not document.text[position : piece.start].strip(), "text between chunks is only whitespace"
        position = piece.stop
    assert not document.text[position:].strip()


def test_paragraphs_are_packed_while_they_fit_and_split_only_when_they_alone_do_not() -> None:
    text = "one two.\n\nthree four.\n\nfive six seven. eight nine ten. eleven.\n\ntwelve."
    pieces = [piece.text for piece in chunk(from_text(text), count_words, chunk_tokens=4)]
    assert pieces == ["one two.\n\nthree four.", "five six seven.", "eight nine ten. eleven.", "twelve."]


def test_a_sentence_is_cut_at_words_and_a_word_at_characters_only_at_need() -> None:
    assert [c.text for c in chunk(from_text("a b c d e. f."), count_words, chunk_tokens=3)] == ["a b c", "d e. f."]
    assert [c.text for c in chunk(from_text("abcdefghij kl"), len, chunk_tokens=4)] == ["abcd", "efgh", "ij", "kl"]


def test_abbreviations_do_not_end_a_sentence() -> None:
    text = "He met Dr. Smith there. She left."
    assert [c.text for c in chunk(from_text(text), count_words, chunk_tokens=5)] == [
        "He met Dr. Smith there.",
        "She left.",
    ]


def test_a_heading_stays_with_its_text_and_is_recorded() -> None:
    text = "intro words here\n\n# Big\n\n## Small\nalpha beta gamma\n\ndelta epsilon\n\n# Next\n\nzeta"
    chunks = chunk(from_text(text, media_type="text/markdown"), count_words, chunk_tokens=8)
    assert [(c.text, c.heading) for c in chunks] == [
        ("intro words here", None),
        ("# Big\n\n## Small\nalpha beta gamma", "Big"),
        ("delta epsilon\n\n# Next\n\nzeta", "Small"),
    ]


def test_a_hash_in_plain_text_or_a_code_fence_is_no_heading() -> None:
    assert chunk(from_text("# comment\n\ncode"), count_words)[0].heading is None
    fenced = from_text("```\n# comment\n```\n\ntext", media_type="text/markdown")
    assert chunk(fenced, count_words)[0].heading is None


def test_html_headings_are_recorded() -> None:
    document = parse(b"<h1>One</h1><p>a b c</p><h2>Two</h2><p>d e f</p>", "a.html")
    assert [c.heading for c in chunk(document, count_words, chunk_tokens=5)] == ["One", "Two"]


def test_the_page_is_the_one_a_chunk_starts_on() -> None:
    document = Document(
        "d", "t", "a b\n\nc d\n\ne f", "f.pdf", "application/pdf", "0", {}, (Page(2, 0, 3), Page(5, 5, 13))
    )
    assert [c.page for c in chunk(document, count_words, chunk_tokens=2)] == [2, 5, 5]


def test_ids_are_deterministic_and_differ_by_document_place_and_text() -> None:
    def ids(text: str, document_id: str) -> list[str]:
        return [c.id for c in chunk(from_text(text, document_id=document_id), count_words, chunk_tokens=2)]

    assert ids("a b\n\na b", "x") == ids("a b\n\na b", "x")
    everything = ids("a b\n\na b", "x") + ids("a b\n\na b", "y") + ids("c d", "x")
    assert len(set(everything)) == 5
    assert all(re.fullmatch(r"chk_[0-9a-f]{24}", chunk_id) for chunk_id in everything)


def test_a_limit_no_character_fits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"too small: 'x'"):
        chunk(from_text("x"), lambda text: 3 * len(text), chunk_tokens=2)
    with pytest.raises(ValueError, match="at least 1"):
        chunk(from_text("x"), len, chunk_tokens=0)


@pytest.mark.parametrize(
    "text", ["word " * 40000, "x" * 60000, "tiny.\n\n" * 20000, "A b. " * 30000, "." * 60000 + "x", '."' * 30000]
)
def test_the_tokenizer_is_asked_for_little_more_than_the_text(text: str) -> None:
    counted = 0

    def count(piece: str) -> int:
        nonlocal counted
        counted += len(piece)
        return count_fours(piece)

    started = time.monotonic()
    chunk(from_text(text), count, chunk_tokens=512)
    assert counted < 40 * len(text)
    assert time.monotonic() - started < 10
