"""Which models can be blended: the config fields that decide, and the message when one forbids it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blend.errors import UnsupportedModelError

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)

_FORBIDDEN: tuple[tuple[str, str], ...] = (
    ("kv_lora_rank", "multi-head latent attention (MLA) stores no per-head K"),
    ("attention_chunk_size", "chunked attention hides rows from one another"),
    ("no_rope_layers", "layers without RoPE are not handled"),
    ("rope_local_base_freq", "two RoPE bases are not handled"),
    ("ssm_state_size", "hybrid (state-space) layers have no KV to reuse"),
    ("mamba_d_state", "hybrid (Mamba) layers have no KV to reuse"),
    ("linear_num_value_heads", "linear-attention layers have no KV to reuse"),
    ("alibi", "ALiBi positions are not rotary"),
)


def check_supported(config: Mapping[str, Any]) -> None:
    """Raise ``UnsupportedModelError`` naming the config field and its value when the model cannot be blended."""
    name = (config.get("architectures") or ["(none)"])[0]
    for field, why in _FORBIDDEN:
        if config.get(field):
            raise UnsupportedModelError(f"config field {field} is {config[field]!r}: {why}")
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise UnsupportedModelError(
            f"config field layer_types has {', '.join(sorted(kinds))}: only full attention can be blended"
        )
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise UnsupportedModelError(
            f"config field sliding_window is {config['sliding_window']!r}: sliding-window attention is not supported"
        )
    if (config.get("quantization_config") or {}).get("kv_cache_scheme"):
        raise UnsupportedModelError("config field quantization_config.kv_cache_scheme: fp8 KV scales are not supported")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"config field architectures is {name!r}; verified architectures: {', '.join(ARCHITECTURES)}"
        )


def head_dim(config: Mapping[str, Any]) -> int:
    """D of the attention heads."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def kv_heads(config: Mapping[str, Any]) -> int:
    """H: key-value heads."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])
