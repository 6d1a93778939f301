"""Compile never stores what could harm a later request."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import blend.method
from blend.errors import NonFiniteError
from blend.method import compile_into
from blend.types import CompileJob
from store.memory import MemoryStore
from store.types import KVKey, KVLayout


class _Model:
    layout = KVLayout(model="m", layers=1, heads=1, head_dim=2, dtype="float16", rope="r")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("plane", [0, 1])
def test_a_chunk_that_compiles_to_nan_or_infinity_is_refused_and_leaves_no_entry(
    bad: float, plane: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    planes = [torch.zeros(1, 3, 1, 2, dtype=torch.float16) for _ in range(2)]
    planes[plane][0, 2, 0, 1] = bad
    monkeypatch.setattr(blend.method, "compile_chunks", lambda model, job: [tuple(planes)])
    job = CompileJob("j", (), ((1, 2, 3),), (KVKey(b"k" * 32),), (b"s" * 32,))
    store = MemoryStore()
    with pytest.raises(NonFiniteError, match="float16"):
        compile_into(_Model(), job, store, tokenizer="t")  # type: ignore[arg-type]
    assert not store.contains(job.keys[0])
    planes[plane].zero_()
    assert compile_into(_Model(), replace(job), store, tokenizer="t").result().bytes > 0  # type: ignore[arg-type]
    assert store.contains(job.keys[0])
