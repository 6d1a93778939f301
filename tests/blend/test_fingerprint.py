"""A model folder is what is in its files: copied it is the same, edited it is another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from blend.errors import EngineError
from blend.fingerprint import model_fingerprint, tokenizer_fingerprint


@pytest.fixture
def folder(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    for file in tiny_model("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_copy_is_the_same_model(tiny_model: Callable[[str], Path], folder: Path) -> None:
    assert model_fingerprint(folder) == model_fingerprint(str(tiny_model("llama")))
    assert tokenizer_fingerprint(folder) == tokenizer_fingerprint(tiny_model("llama"))
    assert len(model_fingerprint(folder)) == 64


def test_one_flipped_bit_of_a_weight_is_another_model(folder: Path) -> None:
    before, tokenizer = model_fingerprint(folder), tokenizer_fingerprint(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert model_fingerprint(folder) != before
    assert tokenizer_fingerprint(folder) == tokenizer


def test_an_edited_config_is_another_model(folder: Path) -> None:
    before = model_fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert model_fingerprint(folder) != before


def test_a_new_template_or_vocabulary_is_another_tokenizer(folder: Path) -> None:
    seen = {tokenizer_fingerprint(folder)}
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(tokenizer_fingerprint(folder))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ 1 }}"}))
    seen.add(tokenizer_fingerprint(folder))
    (folder / "tokenizer.json").write_text("{}")
    seen.add(tokenizer_fingerprint(folder))
    assert len(seen) == 4


def test_names_of_weight_files_count(folder: Path) -> None:
    """Two files with swapped contents are another model."""
    (folder / "a.safetensors").write_bytes(b"1")
    (folder / "b.safetensors").write_bytes(b"2")
    before = model_fingerprint(folder)
    (folder / "a.safetensors").write_bytes(b"2")
    (folder / "b.safetensors").write_bytes(b"1")
    assert model_fingerprint(folder) != before


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"config\.json"):
        model_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineError, match="safetensors"):
        model_fingerprint(tmp_path)
    with pytest.raises(EngineError, match=r"tokenizer\.json"):
        tokenizer_fingerprint(tmp_path)
