"""A small Llama in plain torch with Hugging Face parameter names, and a throwaway teacher for its attention."""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the demo model; the names are those of LlamaConfig."""

    vocab_size: int = 3200
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192

    def hf_config(self) -> dict:
        """config.json of the checkpoint."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "float32",
        }


@dataclass
class AttentionTarget:
    """Rows of one head of one layer and the context rows their attention should fall on.

    rows: [batch, n] row indices; wanted: [batch, n, rows] bool; used: [batch, n] bool (False: padding).
    """

    layer: int
    head: int
    rows: Tensor
    wanted: Tensor
    used: Tensor


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rope(positions: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor]:
    """cos and sin [batch, 1, rows, head_dim] of integer positions [batch, rows], float32 angles."""
    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = positions[:, None, :, None].float() * shape.rope_theta**-half
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Llama, [batch, heads, rows, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, causal: int, targets: list[AttentionTarget]):
        """Attention output and the summed loss of this layer's attention targets."""
        b, n, _ = x.shape
        q = rotate(self.q_proj(x).view(b, n, self.heads, self.dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(b, n, self.kv_heads, self.dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(b, n, self.kv_heads, self.dim).transpose(1, 2)
        loss = sum((self._target_loss(q, k, mask, t) for t in targets), start=torch.zeros(()))
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        q, k = q.to(v.dtype), k.to(v.dtype)
        parts = []
        if causal:
            parts.append(F.scaled_dot_product_attention(*(t[:, :, :causal] for t in (q, k, v)), is_causal=True))
        if causal < n:
            parts.append(F.scaled_dot_product_attention(q[:, :, causal:], k, v, attn_mask=mask[:, :, causal:]))
        out = torch.cat(parts, dim=2)
        return self.o_proj(out.transpose(1, 2).reshape(b, n, -1)), loss

    def read_by(self, head: int) -> Tensor:
        """The rows of the value projection that `head` reads with (a view)."""
        group = head // (self.heads // self.kv_heads)
        return self.v_proj.weight[group * self.dim : (group + 1) * self.dim]

    def _target_loss(self, q: Tensor, k: Tensor, mask: Tensor, target: AttentionTarget) -> Tensor:
        """Mean of -log(attention mass on the wanted rows)."""
        index = target.rows[..., None]
        queries = q[:, target.head].gather(1, index.expand(-1, -1, self.dim)).float()
        keys = k[:, target.head // (self.heads // self.kv_heads)].float()
        scores = queries @ keys.transpose(1, 2) / self.dim**0.5
        seen = mask[:, 0].gather(1, index.expand(-1, -1, mask.shape[-1]))
        scores = scores.masked_fill(~seen, -1e9)
        log_mass = scores.masked_fill(~target.wanted, -1e9).logsumexp(-1) - scores.logsumexp(-1)
        return -(log_mass * target.used).sum() / target.used.sum().clamp(min=1)


class MLP(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, causal: int, targets: list[AttentionTarget]):
        attended, loss = self.self_attn(self.input_layernorm(x), cos, sin, mask, causal, targets)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), loss


class Backbone(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class DemoModel(nn.Module):
    """LlamaForCausalLM with tied embeddings; its state dict is the checkpoint."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Backbone(shape)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = 0.4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                std = 0.1 if "embed" in name else deep * parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std)

    @torch.no_grad()
    def start_as_copy(self, layer: int, head: int) -> None:
        """Make one head write what it reads: its output projection becomes its value projection transposed."""
        attention = self.model.layers[layer].self_attn
        attention.o_proj.weight[:, head * attention.dim : (head + 1) * attention.dim] = attention.read_by(head).T

    @torch.no_grad()
    def read_alike(self, layer: int, head: int, other: tuple[int, int]) -> None:
        """Make one head read what the head `other` (layer, head) reads, and write it."""
        self.model.layers[layer].self_attn.read_by(head).copy_(self.model.layers[other[0]].self_attn.read_by(other[1]))
        self.start_as_copy(layer, head)

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor, causal: int, targets: list[AttentionTarget], tap: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Final hidden states, hidden states after layer `tap`, and the loss of the attention targets.

        ids, positions: [batch, rows]; mask: [batch, 1, rows, rows] bool, True where a row sees a row;
        causal: that many first rows are plainly causal (fast path), 0 for an arbitrary mask.
        """
        cos, sin = rope(positions, self.shape)
        x = self.model.embed_tokens(ids)
        loss, tapped = torch.zeros(()), x
        for index, layer in enumerate(self.model.layers):
            x, layer_loss = layer(x, cos, sin, mask, causal, [t for t in targets if t.layer == index])
            loss = loss + layer_loss
            if index == tap:
                tapped = x
        return self.model.norm(x), tapped, loss

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of (selected) final hidden states."""
        return hidden @ self.model.embed_tokens.weight.T
