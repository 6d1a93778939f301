"""Every error of the retriever room. Messages say what was wrong, with which input, and what to do."""


class RetrieverError(Exception):
    """Base of all retriever errors."""


class ParseError(RetrieverError):
    """A file could not become a document."""


class UnreadableDocumentError(ParseError):
    """The bytes are not what the extension promises: wrong encoding, corrupt or encrypted PDF, malformed JSON."""


class EmptyDocumentError(ParseError):
    """The file was read and holds no text (also: a scanned PDF without a text layer)."""


class UnsupportedFormatError(ParseError):
    """No parser for this extension."""


class UnknownCollectionError(RetrieverError):
    """No collection of that name, or a name that no collection can have."""


class UnknownDocumentError(RetrieverError):
    """No document, or no chunk, of that id."""


class IndexMismatchError(RetrieverError):
    """The data folder was made with another embedder, dimension or schema version."""


class CatalogueError(RetrieverError):
    """SQLite could not do its work: full disk, locked or damaged file. Nothing was half written."""


class EmbedderError(RetrieverError):
    """The embedding model cannot be found or loaded."""


class FilterError(RetrieverError):
    """A metadata filter is malformed."""
