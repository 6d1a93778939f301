"""A Llama-shaped checkpoint with random weights: as slow as a real model of its size, and as silent.

It uses the demo model's tokenizer and chat template, so every part of the system takes it for a model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults have 0.46 B parameters and 24 KiB of bfloat16 KV per token."""

    hidden: int = 1024
    layers: int = 24
    heads: int = 16
    kv_heads: int = 4
    intermediate: int = 5376
    max_positions: int = 32768
    dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"hidden {self.hidden}, heads {self.heads}, kv_heads {self.kv_heads} do not divide")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype {self.dtype!r} is unknown; choose float32, bfloat16 or float16")

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def make_synthetic_model(folder: Path, shape: Shape, tokenizer: Path) -> int:
    """Write the checkpoint to ``folder`` (complete or not at all) and return its number of parameters.

    ``tokenizer`` is a model folder whose tokenizer is copied. Raises ``OSError``.
    """
    config = json.loads((tokenizer / "config.json").read_text("utf-8"))
    vocab, head_dim = int(config["vocab_size"]), shape.hidden // shape.heads
    generator = torch.Generator().manual_seed(shape.seed)
    dtype: torch.dtype = getattr(torch, shape.dtype)

    def linear(rows: int, columns: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(rows, columns, generator=generator) * columns**-0.5
        return drawn.to(dtype=dtype)

    weights = {
        "model.embed_tokens.weight": torch.randn(vocab, shape.hidden, generator=generator).to(dtype),
        "model.norm.weight": torch.ones(shape.hidden, dtype=dtype),
        "lm_head.weight": linear(vocab, shape.hidden) * 4,  # spread the logits, so that greedy tokens are seldom ties
    }
    for i in range(shape.layers):
        at = f"model.layers.{i}."
        weights |= {
            at + "input_layernorm.weight": torch.ones(shape.hidden, dtype=dtype),
            at + "post_attention_layernorm.weight": torch.ones(shape.hidden, dtype=dtype),
            at + "self_attn.q_proj.weight": linear(shape.heads * head_dim, shape.hidden),
            at + "self_attn.k_proj.weight": linear(shape.kv_heads * head_dim, shape.hidden),
            at + "self_attn.v_proj.weight": linear(shape.kv_heads * head_dim, shape.hidden),
            at + "self_attn.o_proj.weight": linear(shape.hidden, shape.heads * head_dim),
            at + "mlp.gate_proj.weight": linear(shape.intermediate, shape.hidden),
            at + "mlp.up_proj.weight": linear(shape.intermediate, shape.hidden),
            at + "mlp.down_proj.weight": linear(shape.hidden, shape.intermediate),
        }
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    made = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": head_dim,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": shape.max_positions,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        **{name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config},
        "torch_dtype": shape.dtype,
    }
    (part / "config.json").write_text(json.dumps(made, indent=2) + "\n", "utf-8")
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, part / name)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return sum(w.numel() for w in weights.values())


def synthetic_model(shape: Shape, tokenizer: Path) -> Path:
    """The checkpoint of ``shape`` in the user's cache folder, made if it is not there."""
    from platformdirs import user_cache_path

    words = hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()[:8]
    folder = user_cache_path("ragblend") / f"synthetic-{shape.digest}-{words}"
    if not (folder / "config.json").is_file():
        make_synthetic_model(folder, shape, tokenizer)
    return folder
