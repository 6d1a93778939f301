"""Where certificates are kept, and the one that counts for a served model."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

from app.settings import CompileSettings
from blend.certificate import Certificate, file_name, read
from blend.engines import EngineInfo
from blend.errors import CertificateError
from blend.fingerprint import model_fingerprint, tokenizer_fingerprint
from blend.rope import rope_from_config
from blend.support import head_dim, kv_heads
from store.types import DTYPES, KVLayout

log = logging.getLogger(__name__)


def compiled_behind(compile: CompileSettings) -> str:
    """What chunks are compiled behind, as certificates name it."""
    return f"neighbours({compile.neighbours})" if compile.context == "neighbours" else compile.context


def in_data(data_dir: Path, layout: KVLayout) -> Path:
    """Beside this server's data: measured here."""
    return data_dir / "certificates" / file_name(layout)


def in_model(model: str, dtype: str) -> Path:
    """In the model folder: it travels with the weights, whose fingerprint does not cover it."""
    return Path(model) / f"ragblend-certificate-{dtype}.json"


def lookup(
    data_dir: Path, model: str, layout: KVLayout, tokenizer: str, compile: str, codec: str
) -> Certificate | None:
    """The certificate of the model in folder ``model``, for KV compiled behind ``compile`` and stored by ``codec``;
    ``None`` if there is none.

    What was measured here goes before what came with the model, whatever it says. Raises ``CertificateError`` for a
    file that cannot be trusted or is for something else.
    """
    for path in (in_data(data_dir, layout), in_model(model, layout.dtype)):
        if path.exists():
            found = read(path)
            found.require(layout, tokenizer, compile, codec)
            return found
    return None


def find_all(
    data_dir: Path, model: str, compile: str, codec: str, dtype: str | None
) -> dict[str, Certificate | CertificateError]:
    """For ``dtype``, or every one: the certificate that a service would find, or what it would say.

    Without an engine; so the weights are read for their fingerprint, if there is any file at all to compare it with.
    Raises ``EngineError`` and ``UnsupportedModelError`` for a folder that cannot be served.
    """
    folder = Path(model)
    if not any(data_dir.glob("certificates/*.json")) and not any(folder.glob("ragblend-certificate-*.json")):
        return {}
    config = json.loads((folder / "config.json").read_text("utf-8"))
    layout = KVLayout(
        model=model_fingerprint(folder),
        layers=int(config["num_hidden_layers"]),
        heads=kv_heads(config),
        head_dim=head_dim(config),
        dtype="float32",
        rope=rope_from_config(config, head_dim(config)).signature,
    )
    tokenizer = tokenizer_fingerprint(folder)
    found: dict[str, Certificate | CertificateError] = {}
    for name in (dtype,) if dtype else DTYPES:
        try:
            one = lookup(data_dir, model, dataclasses.replace(layout, dtype=name), tokenizer, compile, codec)
        except CertificateError as e:
            found[name] = e
        else:
            if one is not None:
                found[name] = one
    return found


def certificate_for_service(data_dir: Path, info: EngineInfo, compile: str, codec: str) -> Certificate | None:
    """As ``lookup``, told to the log. A file that cannot be used counts as none: full prefill is never wrong."""
    try:
        found = lookup(data_dir, info.model, info.layout, info.tokenizer, compile, codec)
    except CertificateError as e:
        log.warning("the model is not certified, auto prefills in full: %s", e)
        return None
    if found is None:
        log.warning("the model is not certified, auto prefills in full; run `ragblend certify --model %s`", info.model)
    elif not found.passed:
        log.warning("the model is not certified, auto prefills in full: %s says %s", found.file, found.reasons[0])
    else:
        log.info("certified: auto blends with %s at ratio %g (%s)", found.selector, found.ratio, found.file)
        if remark := made_elsewhere(found, info.name, info.version):
            log.info("certificate %s: %s", found.file, remark)
    return found


def made_elsewhere(certificate: Certificate, engine: str, version: str) -> str | None:
    """A word on a certificate that another version of ``engine`` has made, or another engine.

    It counts all the same, see ``blend.certificate``; and only the versions of our lock files are served, whose
    agreement the tests check.
    """
    here, there = f"{engine} {version}", f"{certificate.engine} {certificate.engine_version}"
    return None if here == there else f"it was measured on {there}, this is {here}"


def for_report(certificate: Certificate | None) -> dict[str, object]:
    """What a running server shows of it."""
    if certificate is None:
        return {"passed": False}
    names = ("passed", "selector", "ratio", "compile", "codec", "created", "reasons")
    return {name: value for name, value in dataclasses.asdict(certificate).items() if name in names}
