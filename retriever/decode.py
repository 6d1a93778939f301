"""bytes -> str, strictly: a document that would be guessed wrong is refused."""

import codecs
import re

from retriever.errors import UnreadableDocumentError

_BOMS = [
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark is its prefix
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
]
_HTML_CHARSET = re.compile(rb"""<meta[^>]{0,200}charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]{1,40})""", re.IGNORECASE)
# Encodings an HTML page may declare; anything else Python calls a codec (rot13, zip, idna) is not an encoding of text.
_HTML_ENCODINGS = re.compile(
    r"ascii|utf-8|iso8859-\d+|latin.1|cp125\d|koi8-[ru]|gb\w+|big5\w*|shift_jis|euc_(jp|kr)|cp932|cp949"
)


def decode(data: bytes, name: str, *, html: bool = False) -> str:
    """UTF-8, or what a byte order mark or (in HTML) a `<meta charset>` declares; else `UnreadableDocumentError`."""
    encoding, body = "utf-8", data
    for mark, marked in _BOMS:
        if data.startswith(mark):
            encoding, body = marked, data[len(mark) :]
            break
    else:
        declared = _HTML_CHARSET.search(data[:2048]) if html else None
        if declared:
            encoding = _known(declared.group(1).decode("ascii"), name)
        elif b"\x00" in data:
            at = data.index(b"\x00")
            raise UnreadableDocumentError(f"{name}: is binary (a zero byte at offset {at}), not text")
    try:
        return body.decode(encoding)
    except UnicodeDecodeError as error:
        byte = body[error.start]
        raise UnreadableDocumentError(
            f"{name}: byte 0x{byte:02x} at offset {error.start + len(data) - len(body)} is not {encoding}; "
            "save the file as UTF-8"
        ) from error


def _known(declared: str, name: str) -> str:
    try:
        encoding = codecs.lookup(declared).name
    except LookupError:
        encoding = ""
    # Browsers read "latin-1" and "ascii" as Windows-1252, and pages rely on it.
    if encoding in ("ascii", "iso8859-1"):
        return "cp1252"
    if not _HTML_ENCODINGS.fullmatch(encoding):
        raise UnreadableDocumentError(f"{name}: declares the unknown encoding {declared!r}; save the file as UTF-8")
    return encoding
