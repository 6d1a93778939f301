"""Identity of a model folder: hex digests that go into every key, the same for every engine.

Contents count, not names of folders or times: a copied folder keeps its cache, an edited one loses it. Hashing runs at
about the speed of the disk (1 to 2 GB/s), once per start, and reads what loading the model reads anyway.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from blend.errors import EngineError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")


def model_fingerprint(folder: Path | str) -> str:
    """sha256 over ``config.json`` and the contents of all ``*.safetensors``. Raises ``EngineError`` without them."""
    root = Path(folder)
    weights = sorted(root.glob("*.safetensors"))
    if not (root / "config.json").is_file():
        raise EngineError(f"model folder {root} does not exist or has no config.json")
    if not weights:
        raise EngineError(f"model folder {root} has no *.safetensors weights")
    return _digest([root / "config.json", *weights])


def tokenizer_fingerprint(folder: Path | str) -> str:
    """sha256 over what turns text into ids: the tokenizer's files and its chat template. Raises ``EngineError``."""
    root = Path(folder)
    files = [root / name for name in _TOKENIZER_FILES if (root / name).is_file()]
    if not files:
        raise EngineError(f"model folder {root} has no tokenizer.json")
    template = ""
    config = root / "tokenizer_config.json"
    if config.is_file():
        try:
            template = json.dumps(json.loads(config.read_text("utf-8")).get("chat_template"))
        except (OSError, ValueError) as e:
            raise EngineError(f"{config} cannot be read: {e}") from e
    return _digest(files, template)


def _digest(files: list[Path], extra: str = "") -> str:
    total = hashlib.sha256(extra.encode())
    for path in files:
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        except OSError as e:
            raise EngineError(f"{path} cannot be read: {e.strerror or e}") from e
        total.update(path.name.encode() + b"\0" + content)
    return total.hexdigest()
