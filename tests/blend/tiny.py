"""Tiny random models of every supported kind, and plain transformers as the truth about them.

A model is a real Hugging Face folder (config, safetensors, byte-level tokenizer with a chat template like the demo
model's), with weights large enough that attention is not flat: a wrong K changes the answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NO_SYSTEM_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('system role is not supported') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WORDS = (
    "river museum tower garden winter painter bridge market letter village old quiet built born wrote painted lived "
    "moved opened she he it the a of in near with and was is by from seven nineteen harbour"
).split()

ROPES: dict[str, dict[str, Any]] = {
    "llama": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
}
KINDS = (*ROPES, "phi3", "qwen2", "qwen3", "mistral")


def sentence(seed: int, words: int = 12) -> str:
    """Reproducible text; a word is one or two tokens."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)).capitalize() + "."


def _write_tokenizer(folder: Path, template: str) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence(i, 40) for i in range(40)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "additional_special_tokens": list(SPECIAL[3:]),
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def _config(kind: str, vocab: int) -> transformers.PretrainedConfig:
    shape = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": 10000.0, **ROPES.get(kind, ROPES["llama"])},
    }
    if kind in ROPES:
        return transformers.LlamaConfig(**shape)
    if kind == "phi3":
        shape["rope_parameters"] |= {"partial_rotary_factor": 0.5}
        return transformers.Phi3Config(**shape)
    if kind == "mistral":
        return transformers.MistralConfig(**shape, sliding_window=None)
    if kind == "qwen2":  # its heads always divide the hidden size; vLLM does not read its head_dim
        return transformers.Qwen2Config(**shape | {"hidden_size": 128})
    return transformers.Qwen3Config(**shape)


def write_model(folder: Path, kind: str, template: str = TEMPLATE) -> Path:
    """A model folder of ``kind`` with random weights, biases included."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(kind, _write_tokenizer(folder, template))
    torch.manual_seed(KINDS.index(kind))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.5)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)
        model.lm_head.weight.mul_(2)
    model.save_pretrained(folder)
    return folder


class Truth:
    """The independent truth: plain transformers, none of our code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        found = self.net.generate(
            torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return [int(t) for t in found[0, len(ids) :]]

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """[T, vocabulary]."""
        return self.net(torch.tensor([ids])).logits[0].log_softmax(-1)

    @torch.no_grad()
    def kv(self, ids: Sequence[int], first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [L, T, H, D] of ``ids`` standing at ``first ..``."""
        cache = transformers.DynamicCache()
        places = torch.arange(first, first + len(ids))[None]
        self.net(torch.tensor([ids]), past_key_values=cache, position_ids=places)
        return _planes(cache)

    @torch.no_grad()
    def over(self, k: torch.Tensor, v: torch.Tensor, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [T, vocabulary] of ``ids`` prefilled over ``k``, ``v`` [L, N, H, D]; and the K after."""
        cache = _cache(k, v)
        logits = self.net(torch.tensor([ids]), past_key_values=cache).logits[0]
        return logits.log_softmax(-1), _planes(cache)[0]

    @torch.no_grad()
    def attention(self, k: torch.Tensor, v: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
        """[N]: softmax weight of the N cached rows, summed over layers, heads and ``ids``."""
        net = transformers.AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation="eager").eval()
        out = net(torch.tensor([ids]), past_key_values=_cache(k, v), output_attentions=True)
        return torch.stack(out.attentions)[..., : k.shape[1]].sum(dim=(0, 1, 2, 3))


def _cache(k: torch.Tensor, v: torch.Tensor) -> Any:
    cache = transformers.DynamicCache()
    for layer in range(k.shape[0]):
        cache.update(k[layer].transpose(0, 1)[None], v[layer].transpose(0, 1)[None], layer)
    return cache


def _planes(cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
    k = torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.layers])
    v = torch.stack([layer.values[0].transpose(0, 1) for layer in cache.layers])
    return k, v
