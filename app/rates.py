"""How fast models compile chunks on this machine, kept in the data directory for estimates before the next time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from app.bench.machine import cpu_name
from app.files import DataFileError, locked, read_model, replace_text
from store.types import KVLayout

FILE = "rates.json"
_HALF_TOKENS = 100_000  # what was measured so many tokens ago counts half
_LEAST_TOKENS = 256  # a run of fewer is overhead


class Rate(BaseModel):
    """``tokens`` in ``seconds``, older runs counting less; ``measured``: the last, seconds since the epoch."""

    model_config = ConfigDict(extra="forbid")

    engine: str
    dtype: str
    device: str
    machine: str
    tokens: float
    seconds: float
    measured: float

    @classmethod
    def now(cls, engine: str, layout: KVLayout, device: str, tokens: float, seconds: float) -> Rate:
        """Measured here, a moment ago."""
        return cls(
            engine=engine, dtype=layout.dtype, device=device, machine=machine(), tokens=tokens, seconds=seconds,
            measured=time.time(),
        )  # fmt: skip

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    rates: dict[str, Rate] = {}


class Rates:
    """The rates kept in ``folder``, by engine, model (its layout) and machine. Raises ``DataFileError``."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def find(self, engine: str, layout: KVLayout) -> Rate | None:
        """Of this machine; ``None`` if it was never measured here."""
        found = self._read().rates.get(_name(engine, layout))
        return found if found is not None and found.machine == machine() else None

    def learn(self, engine: str, layout: KVLayout, device: str, tokens: int, seconds: float) -> None:
        """Add a run, unless it was too short to tell."""
        if tokens < _LEAST_TOKENS or seconds <= 0:
            return
        try:
            with locked(self._path):
                file = self._read()
                old = file.rates.get(_name(engine, layout))
                same = old is not None and (old.machine, old.device) == (machine(), device)
                weight = 0.5 ** (tokens / _HALF_TOKENS) if same else 0.0
                before, took = (old.tokens, old.seconds) if old else (0.0, 0.0)
                file.rates[_name(engine, layout)] = Rate.now(
                    engine, layout, device, tokens + weight * before, seconds + weight * took
                )
                replace_text(self._path, file.model_dump_json(indent=1))
        except OSError as e:
            raise DataFileError(f"{self._path} cannot be written: {e.strerror or e}") from e

    def _read(self) -> _File:
        remedy = "remove it, they are measured again"
        return read_model(self._path, _File, wrong="does not hold rates", remedy=remedy) or _File()


def machine() -> str:
    """Processor and cores: a data directory may have been carried elsewhere."""
    return f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def _name(engine: str, layout: KVLayout) -> str:
    return f"{engine}-{layout.digest.hex()[:32]}"
