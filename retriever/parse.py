"""bytes -> Document. The only door for files; the readers behind it live in `read_*.py`.

Parsers run on hostile input: the service calls this in a short-lived process with limits. Nothing here needs a
network, and nothing in a file is executed or fetched.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import PurePath

from retriever.clean import clean, clean_line
from retriever.decode import decode
from retriever.errors import EmptyDocumentError, UnreadableDocumentError, UnsupportedFormatError
from retriever.item import Item
from retriever.metadata import clean_metadata
from retriever.read_html import read_html
from retriever.read_json import read_json, read_jsonl
from retriever.read_markdown import read_markdown
from retriever.read_pdf import read_pdf
from retriever.types import Document, Page, Scalar

_MEDIA_TYPES = {
    ".txt": "text/plain",
    ".text": "text/plain",
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".html": "text/html",
    ".htm": "text/html",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".ndjson": "application/jsonl",
    ".pdf": "application/pdf",
}
_MAGIC = {  # what a file often is when its extension says otherwise
    b"%PDF-": "a PDF",
    b"PK\x03\x04": "a zip archive (docx, xlsx, epub)",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"\x1f\x8b": "gzip data",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"{\\rtf": "an RTF document",
    b"\x7fELF": "a program",
}
_ID = re.compile(r"[^\s\x00-\x1f\x7f]{1,256}")


def formats() -> dict[str, str]:
    """File extension (lower case, with its dot) -> media type, for every format `parse` reads."""
    return dict(_MEDIA_TYPES)


def parse(
    data: bytes,
    filename: str,
    *,
    title: str | None = None,
    metadata: Mapping[str, Scalar] | None = None,
    document_id: str | None = None,
) -> Document:
    """One file -> one document.

    The title is the one given, else the file's own (front matter or first heading, `<title>`, JSON "title", PDF title),
    else the name without extension. `metadata` is added to the file's own and wins.

    The id is the one given, else the JSON item's own, else "doc_" + 24 hex of sha256 over the file name and the raw
    bytes. Raw bytes, not the extracted text: after an upgrade of a parser the same file keeps its id, so ingesting it
    again replaces the old text instead of standing beside it. The name is part of it because two files of equal
    content and different names are cited differently. Give `document_id` to let an edited file replace its old self.

    Raises `UnsupportedFormatError`, `UnreadableDocumentError`, `EmptyDocumentError`.
    """
    documents = parse_many(data, filename, title=title, metadata=metadata, document_id=document_id)
    if len(documents) != 1:
        raise UnreadableDocumentError(f"{_label(filename)}: holds {len(documents)} documents; parse it with parse_many")
    return documents[0]


def parse_many(
    data: bytes,
    filename: str,
    *,
    title: str | None = None,
    metadata: Mapping[str, Scalar] | None = None,
    document_id: str | None = None,
) -> list[Document]:
    """Like `parse`, for files that may hold several documents: a JSON array, `{"documents": [...]}`, or JSON lines.

    `title` and `document_id` then fit one document only (`UnreadableDocumentError` otherwise). Every item is
    identified by its own bytes, so that changing one item of an array leaves the ids of the others alone.
    """
    name = _label(filename)
    media_type = _media_type(data, name)
    items = _read(data, name, media_type)
    if not items:
        raise EmptyDocumentError(f"{name}: holds no documents")
    if len(items) > 1 and (title is not None or document_id is not None):
        raise UnreadableDocumentError(f"{name}: holds {len(items)} documents; a title or id can only be given to one")
    return [
        _document(item, name, media_type, title=title, metadata=metadata or {}, document_id=document_id)
        for item in items
    ]


def from_text(
    text: str,
    *,
    title: str | None = None,
    filename: str = "text.txt",
    media_type: str = "text/plain",
    metadata: Mapping[str, Scalar] | None = None,
    document_id: str | None = None,
) -> Document:
    """A document from text already at hand (a JSON request). Cleaned and identified as a file of that text would be."""
    raw = text.encode("utf-8", "surrogatepass")
    item = Item(text=clean(text).strip("\n"), raw=raw)
    return _document(item, _label(filename), media_type, title=title, metadata=metadata or {}, document_id=document_id)


def _label(filename: str) -> str:
    """A file name is a label, never a path: only its last part, on one line."""
    return clean_line(PurePath(filename.replace("\\", "/")).name)[:255] or "unnamed"


def _media_type(data: bytes, name: str) -> str:
    extension = PurePath(name).suffix.lower()
    media_type = _MEDIA_TYPES.get(extension)
    if media_type is None:
        known = " ".join(_MEDIA_TYPES)
        raise UnsupportedFormatError(
            f"{name}: no parser for {extension or 'a name without extension'}; known are {known}"
        )
    if not data.strip():
        raise EmptyDocumentError(f"{name}: the file is empty")
    found = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
    if media_type == "application/pdf":
        if b"%PDF-" not in data[:1024]:
            raise UnreadableDocumentError(f"{name}: is {found or 'not a PDF'}; rename it or export it as a PDF")
    elif found is not None:
        raise UnreadableDocumentError(f"{name}: is {found}, not {media_type}; rename it or export it as text or PDF")
    return media_type


def _read(data: bytes, name: str, media_type: str) -> list[Item]:
    match media_type:
        case "application/pdf":
            return [read_pdf(data, name)]
        case "text/html":
            return [read_html(decode(data, name, html=True), data)]
        case "text/markdown":
            return [read_markdown(decode(data, name), data)]
        case "application/json":
            return read_json(decode(data, name), name)
        case "application/jsonl":
            return read_jsonl(decode(data, name), name)
        case _:
            return [Item(text=clean(decode(data, name)).strip("\n"), raw=data)]


def _document(
    item: Item,
    name: str,
    media_type: str,
    *,
    title: str | None,
    metadata: Mapping[str, Scalar],
    document_id: str | None,
) -> Document:
    if not item.text.strip():
        what = "has no text layer; run OCR over it first" if media_type == "application/pdf" else "holds no text"
        raise EmptyDocumentError(f"{name}: {what}")
    chosen = document_id if document_id is not None else item.id
    if chosen is not None and (not _ID.fullmatch(chosen) or clean(chosen) != chosen):
        raise UnreadableDocumentError(
            f"{name}: document id {chosen!r} must be 1 to 256 visible characters without spaces"
        )
    digest = hashlib.sha256(json.dumps(name).encode() + b"\n" + item.raw).hexdigest()
    return Document(
        id=chosen if chosen is not None else "doc_" + digest[:24],
        title=clean_line(title or "") or clean_line(item.title or "") or PurePath(name).stem,
        text=item.text,
        filename=name,
        media_type=media_type,
        sha256=hashlib.sha256(item.raw).hexdigest(),
        metadata={**item.metadata, **clean_metadata(metadata, name)},
        pages=tuple(Page(number, start, stop) for number, start, stop in item.pages),
    )
