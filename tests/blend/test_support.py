"""Models that cannot be blended do not start; the message names the config field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from blend.engines import EngineConfig
from blend.engines.transformers.model import load_weights
from blend.errors import EngineError, UnsupportedModelError
from blend.support import check_supported

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def _save(folder: Path, config: Any, architecture: str) -> EngineConfig:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return EngineConfig(str(folder), dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("make", "architecture", "field"),
    [
        (
            lambda: transformers.MistralConfig(**SMALL, sliding_window=128),
            "MistralForCausalLM",
            "sliding_window|layer_types",
        ),
        (
            lambda: transformers.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=64, max_window_layers=1),
            "Qwen2ForCausalLM",
            "sliding_window|layer_types",
        ),
        (lambda: transformers.DeepseekV3Config(num_hidden_layers=2), "DeepseekV3ForCausalLM", "kv_lora_rank"),
        (lambda: transformers.JambaConfig(**SMALL), "JambaForCausalLM", "mamba_d_state"),
        (lambda: transformers.Gemma2Config(**SMALL), "Gemma2ForCausalLM", "layer_types"),
        (lambda: transformers.GPT2Config(n_layer=2), "GPT2LMHeadModel", "architectures"),
        (
            lambda: transformers.LlamaConfig(
                **SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
            ),
            "LlamaForCausalLM",
            "rope_type is 'dynamic'",
        ),
        (
            lambda: transformers.Phi3Config(
                **SMALL,
                pad_token_id=0,
                original_max_position_embeddings=4096,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                },
            ),
            "Phi3ForCausalLM",
            "rope_type is 'longrope'",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_field_that_forbids_blending_is_named(
    tmp_path: Path, make: Callable[[], Any], architecture: str, field: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=field):
        load_weights(_save(tmp_path, make(), architecture))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_lora_rank", 512),
        ("attention_chunk_size", 8192),
        ("no_rope_layers", [0, 1]),
        ("ssm_state_size", 16),
        ("linear_num_value_heads", 4),
        ("alibi", True),
        ("sliding_window", 4096),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("architectures", ["FalconForCausalLM"]),
        ("quantization_config", {"kv_cache_scheme": {"num_bits": 8}}),
    ],
)
def test_each_forbidden_field_is_refused(field: str, value: Any) -> None:
    good = {"architectures": ["LlamaForCausalLM"], "sliding_window": None, "layer_types": ["full_attention"]}
    check_supported(good)
    with pytest.raises(UnsupportedModelError, match=field):
        check_supported(good | {field: value})


def test_an_unused_sliding_window_is_fine() -> None:
    check_supported({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "use_sliding_window": False})


def test_a_config_without_quantization_may_say_so() -> None:
    check_supported({"architectures": ["LlamaForCausalLM"], "quantization_config": None})


def _drop(file: Path, name: str) -> None:
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded|weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"not weights"), "cannot be loaded"),
        (lambda f: _drop(f / "model.safetensors", "model.norm.weight"), r"lacks 1 weights, model\.norm\.weight"),
    ],
)
def test_a_broken_folder_is_an_error_with_its_name(
    tmp_path: Path, tiny_model: Callable[[str], Path], break_it: Callable[[Path], Any], says: str
) -> None:
    for file in tiny_model("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    break_it(tmp_path)
    with pytest.raises(EngineError, match=says) as caught:
        load_weights(EngineConfig(str(tmp_path), device="cpu"))
    assert str(tmp_path) in str(caught.value)


def test_an_unknown_model_type_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense", "architectures": ["Nonsense"]}))
    with pytest.raises((EngineError, UnsupportedModelError), match=r"nonsense|Nonsense"):
        load_weights(EngineConfig(str(tmp_path), device="cpu"))


def test_a_folder_that_does_not_exist_is_named() -> None:
    with pytest.raises(EngineError, match="no/such/model"):
        load_weights(EngineConfig("no/such/model"))


def test_an_unknown_dtype_or_device_shows_the_choices(tiny_model: Callable[[str], Path]) -> None:
    folder = str(tiny_model("llama"))
    with pytest.raises(EngineError, match=r"float8.*float32, bfloat16, float16"):
        load_weights(EngineConfig(folder, dtype="float8"))
    with pytest.raises(EngineError, match="'toaster'"):
        load_weights(EngineConfig(folder, device="toaster"))
