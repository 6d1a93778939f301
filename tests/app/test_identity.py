"""The service over KV that somebody else's model, tokenizer, template or format made: 0 hits, each with its reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app import trivial
from blend import prompt as prompts
from store import KVStore, StoreConfig, open_store

from .conftest import Kit, OpenKit

CHUNKS = 5  # of DOCUMENTS, and the prefix


def changed_layout(**fields: Any) -> Any:
    return lambda patch: patch.setattr(trivial, "LAYOUT", replace(trivial.LAYOUT, **fields))


def changed_template(patch: pytest.MonkeyPatch) -> None:
    template = trivial.ByteTokenizer.apply_chat_template

    def changed(self: Any, messages: Any, **options: Any) -> str:
        return template(self, messages, **options).replace("<|system|>", "<|system|>\n")

    patch.setattr(trivial.ByteTokenizer, "apply_chat_template", changed)


def changed_format(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("store.key.FORMAT_VERSION", 999)


CHANGES: dict[str, tuple[Any, set[str]]] = {
    "model": (changed_layout(model="trivial-2"), {"model_changed"}),
    "dtype": (changed_layout(dtype="bfloat16"), {"model_changed"}),
    "rope": (changed_layout(rope="other"), {"model_changed"}),
    "tokenizer": (lambda patch: patch.setattr(trivial, "TOKENIZER", "bytes-2"), {"tokenizer_changed"}),
    "template": (changed_template, {"never_precomputed"}),
    "instruction": (
        lambda patch: patch.setattr(prompts.PromptLayout.__init__, "__kwdefaults__", {"instruction": "Be brief."}),
        {"never_precomputed"},
    ),
    "format": (changed_format, {"never_precomputed"}),
}


def open_disk(folder: Path) -> KVStore:
    return open_store(StoreConfig(path=folder / "kv", ram_bytes=1 << 20))


async def cache_of(kit: Kit) -> dict[str, Any]:
    body = {"max_num_results": 10, "blend": {"mode": "reuse"}}
    answer = await kit.chat(rag=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["rag"]["cache"]
    return found


@pytest.mark.parametrize("change", CHANGES)
async def test_nothing_of_before_is_served_after_a_change(
    open_kit: OpenKit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    kit = await open_kit(store=open_disk(tmp_path))
    assert (await kit.ingest())["state"] == "precomputed"
    before = await cache_of(kit)
    assert (before["missing"], before["reused"]) == (0, before["tokens"])
    assert len(before["chunks"]) == CHUNKS
    await kit.service.close()

    apply, reasons = CHANGES[change]
    apply(monkeypatch)
    kit = await open_kit(store=open_disk(tmp_path))
    after = await cache_of(kit)
    assert (after["reused"], after["missing"]) == (0, after["tokens"])
    assert {chunk["miss_reason"] for chunk in after["chunks"]} == reasons
    await kit.service.close()

    monkeypatch.undo()  # nothing was lost by it
    kit = await open_kit(store=open_disk(tmp_path))
    assert (await cache_of(kit))["reused"] == before["tokens"]
