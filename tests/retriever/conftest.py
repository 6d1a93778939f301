"""Fixtures of the retriever room: a word counter for a tokenizer, the hash embedder for a model, PDFs made by hand."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from retriever.embed import HashEmbedder
from retriever.parse import from_text
from retriever.retriever import Retriever
from retriever.types import Document


def count_words(text: str) -> int:
    return len(text.split())


def make_pdf(*pages: str, title: str = "", encrypted: bool = False) -> bytes:
    """A minimal PDF with one line of text per page line; "" gives a page without a text layer."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    objects.append(f"<< /Title ({title}) >>".encode())
    kids = []
    for page in pages:
        lines = "".join(f"({line}) Tj T* " for line in page.split("\n")) if page else ""
        stream = f"BT /F1 12 Tf 14 TL 72 720 Td {lines}ET".encode()
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >> "
            b"/Contents %d 0 R >>" % len(objects)
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>".encode()
    trailer = "/Info 4 0 R"
    if encrypted:
        key = "00" * 32
        objects.append(f"<< /Filter /Standard /V 1 /R 2 /O <{key}> /U <{key}> /P -4 >>".encode())
        trailer += f" /Encrypt {len(objects)} 0 R /ID [<00> <00>]"
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    data += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}".encode()
    start = len(data) - len(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}")
    return data + f"trailer << /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{start}\n%%EOF".encode()


@pytest.fixture
def pdf() -> Callable[..., bytes]:
    return make_pdf


@pytest.fixture
def retriever(tmp_path: Path) -> Iterator[Retriever]:
    with Retriever.open(tmp_path / "data", HashEmbedder(), count_words, chunk_tokens=20) as opened:
        yield opened


@pytest.fixture
def people() -> list[Document]:
    """Three documents; the later paragraphs name nobody."""
    return [
        from_text(
            "# Ada\n\nAda was born in London.\n\n## Work\n\nShe wrote programs for an engine that was never finished, "
            "and corresponded with many people of her time about it.\n\n## Death\n\nShe died in 1852 of an illness.",
            title="Ada Lovelace",
            media_type="text/markdown",
            document_id="ada",
            metadata={"year": 1852, "field": "computing", "living": False},
        ),
        from_text(
            "Bob lives in Paris and paints.\n\nHe sells his pictures on a bridge every Sunday in the summer months, "
            "mostly to tourists, and lives on that.",
            title="Bob Martin",
            document_id="bob",
            metadata={"year": 1990, "field": "art", "living": True},
        ),
        from_text(
            "Carla is a physicist.\n\nShe measured the lifetime of the neutron.",
            title="Carla Rossi",
            document_id="carla",
            metadata={"field": "physics"},
        ),
    ]
