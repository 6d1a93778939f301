"""The certificate of a model: proof, by its own weights, that blending it is exact where it must be and good elsewhere.

``auto`` blends only with a certificate that was passed by this very model, tokenizer, RoPE and dtype. It was measured
on an engine; another engine of the same dtype may use it, because the engines agree token by token (invariant 10, a
test for every architecture we serve), and agreement at a ratio is a property of the weights and of the selector.
Another dtype may not: its rounding moves the answers that are compared. Nor may KV compiled behind something else, or
stored by a codec that loses other bits than the one it was measured with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from blend.errors import CertificateError, UnknownSelectorError
from blend.select import open_selector
from store.codec import CODECS
from store.types import KVLayout

FORMAT = 2
ALL_TASKS = "all"


@dataclass(frozen=True)
class Check:
    """One exactness check: its largest ``error`` and what is allowed; ``detail`` says of what, in which unit."""

    name: str
    passed: bool
    error: float
    limit: float
    detail: str


@dataclass(frozen=True)
class Trial:
    """One selector at one ratio over ``n`` questions of ``task`` (``ALL_TASKS``: each question counts the same).

    ``agreement``: share of greedy answers equal to full prefill's, token by token. ``score``, ``full_score``: the
    calibration's metric, blended and by full prefill. ``kl``: mean KL of the first token in nats, if known.
    """

    task: str
    selector: str
    ratio: float
    n: int
    agreement: float
    score: float
    full_score: float
    kl: float | None


@dataclass(frozen=True)
class Calibration:
    """The questions: generated ones of ``seed``, or those of a file (the beginning of its sha256 is ``data``).

    ``questions`` of each task, and ``metric``, what their scores are.
    """

    seed: int | None
    data: str | None
    tasks: tuple[str, ...]
    questions: int
    metric: str


@dataclass(frozen=True)
class Certificate:
    """What ``ragblend certify`` found. Fingerprints are hex; ``dtype`` and ``rope`` as in ``KVLayout``.

    ``codec`` names how the KV was stored. ``selector`` (a spec) and ``ratio`` are what ``auto`` does where nothing else
    was asked for; ``reasons`` say why it was not passed. ``profile`` compares which layers to probe, ``ratios`` the
    best of them at several ratios.
    """

    model: str
    tokenizer: str
    layout: str
    dtype: str
    rope: str
    engine: str
    engine_version: str
    compile: str
    codec: str
    checks: tuple[Check, ...]
    profile: tuple[Trial, ...]
    ratios: tuple[Trial, ...]
    calibration: Calibration
    floor: float
    selector: str
    ratio: float
    passed: bool
    reasons: tuple[str, ...]
    created: str
    ragblend: str
    format: int = FORMAT
    file: str = field(default="", compare=False)
    """Where it was read from; not part of it."""

    def require(self, layout: KVLayout, tokenizer: str, compile: str, codec: str) -> None:
        """Raise ``CertificateError`` naming both values unless it was made for exactly this model, served like this.

        What was measured through a lossy codec holds without it too.
        """
        lossless = codec in CODECS and CODECS[codec].lossless
        pairs = (
            ("model fingerprint", self.model, layout.model),
            ("tokenizer fingerprint", self.tokenizer, tokenizer),
            ("dtype", self.dtype, layout.dtype),
            ("RoPE signature", self.rope, layout.rope),
            ("layout digest", self.layout, layout.digest.hex()),
            ("compile context", self.compile, compile),
            ("KV stored as", self.codec, self.codec if lossless else codec),
        )
        for name, theirs, ours in pairs:
            if theirs != ours:
                raise CertificateError(
                    f"{self.file or 'the certificate'} is for {name} {theirs}, this is {ours}; "
                    "run `ragblend certify` again"
                )

    def to_json(self) -> str:
        """The file's text; ``digest`` is the sha256 of everything else in it."""
        content = _content(self)
        return json.dumps(content | {"digest": _digest(content)}, indent=1, ensure_ascii=False) + "\n"


def file_name(layout: KVLayout) -> str:
    """The certificate's name among those of many models."""
    return f"{layout.model[:16]}-{layout.dtype}.json"


def write(certificate: Certificate, path: Path) -> None:
    """Put it at ``path``, whole or not at all. Raises ``CertificateError``."""
    draft = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8") as f:
            f.write(certificate.to_json())
            f.flush()
            os.fsync(f.fileno())
        os.replace(draft, path)
    except OSError as e:
        with suppress(OSError):
            draft.unlink()
        raise CertificateError(f"the certificate {path} cannot be written: {e.strerror or e}") from e


def read(path: Path) -> Certificate:
    """The certificate in ``path``. Raises ``CertificateError`` naming the file and what is wrong with it."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as e:
        raise CertificateError(f"the certificate {path} cannot be read: {e.strerror or e}") from e
    except ValueError as e:
        raise CertificateError(f"the certificate {path} is cut off or no JSON: {e}; certify again") from e
    try:
        return dataclasses.replace(_parse(found), file=str(path))
    except (ValueError, UnknownSelectorError) as e:
        raise CertificateError(f"the certificate {path} is refused: {e}; certify again") from e


def _content(certificate: Certificate) -> dict[str, Any]:
    content = dataclasses.asdict(certificate)
    del content["file"]
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parse(found: Any) -> Certificate:
    """Raises ``ValueError`` naming the field."""
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    content = dict(found)
    if content.get("format") != FORMAT:
        raise ValueError(f"format is {content.get('format')!r}, this version reads {FORMAT}")
    digest = content.pop("digest", None)
    if digest != _digest(content):
        raise ValueError(f"it was changed after it was written (digest {str(digest)[:16]} is not that of its content)")
    certificate: Certificate = _read(Certificate, content, "")
    for name in ("floor", "ratio"):
        if not 0.0 <= getattr(certificate, name) <= 1.0:
            raise ValueError(f"{name} is {getattr(certificate, name)}, not within 0..1")
    open_selector(certificate.selector)
    if not certificate.passed and not certificate.reasons:
        raise ValueError("it was not passed and gives no reasons")
    return certificate


def _read(kind: Any, value: Any, where: str) -> Any:
    """``value`` from JSON as ``kind``: a dataclass, ``tuple[X, ...]``, ``X | None``, or a plain type, and no other."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}, not an object")
        types = get_type_hints(kind)
        names = {f.name for f in dataclasses.fields(kind)} - {"file"}
        for name in sorted(names ^ value.keys()):
            raise ValueError(f"{_dotted(where, name)} is {'missing' if name in names else 'unknown'}")
        return kind(**{name: _read(types[name], value[name], _dotted(where, name)) for name in names})
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}, not a list")
        return tuple(_read(get_args(kind)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if get_origin(kind) in (UnionType, Union):
        return None if value is None else _read(get_args(kind)[0], value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{where} is {value!r}, not a {kind.__name__}")
    return value


def _dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
