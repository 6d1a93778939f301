"""The text layer of a PDF, page by page. No OCR."""

import re
import threading

import pypdfium2

from retriever.clean import clean, clean_line
from retriever.errors import UnreadableDocumentError
from retriever.item import Item

_PDFIUM = threading.Lock()  # PDFium is not thread-safe
_PAGE_GAP = "\n\n"
# PDFium marks the hyphen of a word broken at a line end with U+FFFE (older builds: U+0002).
_BROKEN_WORD = re.compile("[\ufffe\x02]\\s*")


def read_pdf(data: bytes, name: str) -> Item:
    """Text of all pages with their character ranges; pages without text have none.

    Raises `UnreadableDocumentError` for an encrypted or damaged file.
    """
    with _PDFIUM:
        try:
            pages, title = _extract(data)
        except pypdfium2.PdfiumError as error:
            if "password" in str(error).lower() or "security" in str(error).lower():
                raise UnreadableDocumentError(f"{name}: the PDF is encrypted; remove its password first") from error
            raise UnreadableDocumentError(f"{name}: the PDF is damaged ({error}); export it again") from error
    ranges: list[tuple[int, int, int]] = []
    parts: list[str] = []
    length = 0
    for number, page in enumerate(pages, start=1):
        text = clean(_BROKEN_WORD.sub("", page)).strip()
        if not text:
            continue
        length += len(_PAGE_GAP) if parts else 0
        parts.append(text)
        ranges.append((number, length, length + len(text)))
        length += len(text)
    return Item(text=_PAGE_GAP.join(parts), raw=data, title=clean_line(title) or None, pages=tuple(ranges))


def _extract(data: bytes) -> tuple[list[str], str]:
    document = pypdfium2.PdfDocument(data)
    try:
        pages = []
        for page in document:
            layer = page.get_textpage()
            pages.append(str(layer.get_text_range(errors="ignore")))
            layer.close()
            page.close()
        return pages, str(document.get_metadata_value("Title"))
    finally:
        document.close()
