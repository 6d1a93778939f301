"""A transformers model whose decoder layers run on chosen rows of one request.

Nothing model-specific is re-implemented: the layers, the rotary module, the norm and the head are the model's own. Two
seams of transformers do the work: the cache passed to a layer (``_Cache.update`` scatters into full-length buffers),
and its attention interface (``_attend`` masks by position and notes what it saw). The attention function is registered
once and has no state; the step travels to it through the layer's keyword arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from blend.engines.base import EngineConfig
from blend.errors import EngineError, UnsupportedModelError
from blend.fingerprint import model_fingerprint
from blend.method import walk
from blend.model import Observed
from blend.rope import Rope, check_tables, rope_from_config
from blend.support import check_supported, head_dim, kv_heads
from store.types import DTYPES, KVLayout

ATTENTION = "ragblend"
_BLOCK = 1024  # query rows attended at once; bounds the mask to _BLOCK x N


@dataclass(frozen=True, eq=False)
class Weights:
    """A loaded model, shared by all requests. ``net`` is the transformers model; ``max_positions`` its limit."""

    net: Any
    layout: KVLayout
    rope: Rope
    scale: float
    device: torch.device
    vocab_size: int
    max_positions: int


@dataclass(frozen=True, eq=False)
class _Step:
    """What depends on the rows only: ``rows`` [R] on the device, ``cos`` and ``sin`` [1, R, rotary_dim]."""

    cache: _Cache
    rows: Tensor
    positions: tuple[Tensor, Tensor]
    stops: tuple[int, ...]  # per block of rows, one past its last row
    whole: bool  # rows 0 .. R - 1, so that causal attention needs no mask


class _Cache:
    """Full-length K and V of one request: [L, H, N, D], zero where nothing was written."""

    def __init__(self, weights: Weights, length: int) -> None:
        lay = weights.layout
        shape = (lay.layers, lay.heads, length, lay.head_dim)
        self.k = torch.zeros(shape, dtype=lay.torch_dtype, device=weights.device)
        self.v = torch.zeros_like(self.k)
        self.rows: Tensor | None = None
        self.q: Tensor | None = None
        self.fresh: tuple[Tensor, Tensor] | None = None

    def update(self, k: Tensor, v: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """transformers' cache protocol: ``k``, ``v`` [1, H, R, D] of the current rows to all rows' [1, H, N, D]."""
        self.fresh = (k, v)
        self.k[layer, :, self.rows] = k[0]
        self.v[layer, :, self.rows] = v[0]
        return self.k[layer][None], self.v[layer][None]


class RowModel:
    """``BlendModel`` of one request with room for ``length`` rows."""

    def __init__(self, weights: Weights, length: int) -> None:
        self.weights = weights
        self.layout = weights.layout
        self.rope = weights.rope
        self.scale = weights.scale
        self.cache = _Cache(weights, length)

    def prepare(self, rows: Tensor) -> _Step:
        stops = tuple(int(block[-1]) + 1 for block in rows.split(_BLOCK) if block.numel())
        there = rows.to(self.weights.device)
        like = torch.empty(0, dtype=self.layout.torch_dtype, device=self.weights.device)
        whole = bool(stops) and stops[-1] == rows.numel()  # they ascend
        return _Step(self.cache, there, self.weights.net.model.rotary_emb(like, there[None]), stops, whole)

    def embed(self, token_ids: Tensor) -> Tensor:
        hidden: Tensor = self.weights.net.get_input_embeddings()(token_ids.to(self.weights.device))
        return hidden

    def write_kv(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        there = rows.to(self.weights.device)
        self.cache.k[layer, :, there] = k.to(self.weights.device).transpose(0, 1)
        self.cache.v[layer, :, there] = v.to(self.weights.device).transpose(0, 1)

    def forward_layer(self, layer: int, hidden: Tensor, step: _Step) -> Tensor:
        if not step.stops:
            self.cache.q = self.cache.fresh = None
            return hidden
        self.cache.rows = step.rows
        out = self.weights.net.model.layers[layer](
            hidden[None],
            attention_mask=None,  # _attend masks by position, block by block
            position_ids=step.rows[None],
            past_key_values=self.cache,
            position_embeddings=step.positions,
            blend_step=step,
        )
        result: Tensor = out[0]
        return result

    def observe(self) -> Observed:
        lay, cache = self.layout, self.cache
        if cache.q is None or cache.fresh is None:  # a walk over no rows
            none = torch.empty(0, lay.heads, lay.head_dim, dtype=lay.torch_dtype)
            return Observed(none, none, none)
        k, v = cache.fresh
        return Observed(cache.q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1))

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, d_model] from the last layer -> [R, vocabulary] float32 on the CPU, by the model's own norm and head."""
        net = self.weights.net
        out: Tensor = net.get_output_embeddings()(net.model.norm(hidden))
        return out.float().cpu()


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float,
            blend_step: _Step, **_: Any) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: ``query`` [1, Hq, R, D] -> [1, R, Hq, D].

    Each row sees the keys up to its own position. Keys beyond a block's last row are cut off, not masked.
    """
    blend_step.cache.q = query
    if blend_step.whole:  # torch's causal attention is twice as fast as one with a mask
        k, v = (x[:, :, : query.shape[2]] for x in (key, value))
        return sdpa_attention_forward(module, query, k, v, None, scaling=scaling, is_causal=True)[0], None
    out = []
    blocks = zip(query.split(_BLOCK, dim=2), blend_step.rows.split(_BLOCK), blend_step.stops, strict=True)
    for q, rows, stop in blocks:
        places = torch.arange(stop, device=rows.device)
        mask = None if rows.numel() == 1 else (places <= rows[:, None])[None, None]
        k, v = key[:, :, :stop], value[:, :, :stop]
        out.append(sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, is_causal=False)[0])
    return torch.cat(out, dim=1), None


AttentionInterface.register(ATTENTION, _attend)


def load_weights(config: EngineConfig) -> Weights:
    """Read the model folder. Raises ``EngineError`` naming it, ``UnsupportedModelError`` naming the config field."""
    folder = Path(config.model)
    if not (folder / "config.json").is_file():
        raise EngineError(f"model folder {config.model} does not exist or has no config.json")
    try:
        hf = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as e:
        raise EngineError(f"the config of {folder} cannot be read: {e}") from e
    plain = hf.to_dict()
    check_supported(plain)
    rope = rope_from_config(plain, head_dim(plain))
    device = _device(config.device)
    dtype = _dtype(config, hf, device)
    net = _read(folder, DTYPES[dtype]).to(device)
    layout = KVLayout(
        model=model_fingerprint(folder),
        layers=int(hf.num_hidden_layers),
        heads=kv_heads(plain),
        head_dim=head_dim(plain),
        dtype=dtype,
        rope=rope.signature,
    )
    limit = int(hf.max_position_embeddings)
    scale = float(net.model.layers[0].self_attn.scaling)
    weights = Weights(net, layout, rope, scale, device, int(hf.vocab_size), limit)
    with torch.no_grad():
        _check_rotary(weights)
        _check_walk(weights)
    return weights


def _read(folder: Path, dtype: torch.dtype) -> Any:
    """The transformers model, every weight of it from ``folder``."""
    try:
        net, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, RuntimeError, ImportError, SafetensorError) as e:
        raise EngineError(f"the model in {folder} cannot be loaded: {e}") from e
    if report["missing_keys"]:  # transformers would serve random numbers in their place
        lost = sorted(report["missing_keys"])
        raise EngineError(f"the model in {folder} lacks {len(lost)} weights, {lost[0]} among them")
    return net.eval().requires_grad_(requires_grad=False)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise EngineError(f"device {name!r} cannot be used: {str(e).splitlines()[0]}") from e
    return torch.device(name)


def _dtype(config: EngineConfig, hf: Any, device: torch.device) -> str:
    own = "float32" if device.type == "cpu" else str(hf.dtype or torch.float32).removeprefix("torch.")
    name = config.dtype or own
    if name not in DTYPES:
        raise EngineError(f"dtype {name!r} is not supported; choose one of {', '.join(DTYPES)}")
    return name


def _check_rotary(weights: Weights) -> None:
    """Our angles against the model's own rotary module, near and far (where its float32 angles are coarse)."""
    module, half = weights.net.model.rotary_emb, weights.rope.inv_freq.numel()
    like = torch.empty(0, dtype=torch.float32, device=weights.device)
    far = weights.max_positions - 1
    for positions, tolerance in ((torch.tensor([0, 1, 17]), 1e-5), (torch.tensor([far]), 1e-5 + 2.5e-7 * far)):
        cos, sin = (x[0].cpu() for x in module(like, positions[None].to(weights.device)))
        if cos.shape[-1] != 2 * half:
            raise UnsupportedModelError(
                f"the model rotates {cos.shape[-1]} dimensions, config field rope_parameters says {2 * half}"
            )
        check_tables(weights.rope, positions, cos[:, :half], sin[:, :half], tolerance)


def _check_walk(weights: Weights) -> None:
    """Our walk against the model's own forward on a few tokens; afterwards the model attends through ``_attend``."""
    ids = torch.arange(8) * 31 % weights.vocab_size
    expected = weights.net(ids[None].to(weights.device), use_cache=False).logits[0].float().cpu()
    weights.net.set_attn_implementation(ATTENTION)
    model = RowModel(weights, len(ids))
    walk(model, ids, torch.arange(len(ids)))
    got = model.logits(walk(model, ids, torch.arange(1, len(ids), 2)))
    worst = float((got - expected[1::2]).abs().max())
    # Rounding of the dtype over a whole model; a wrong scale, norm or mask is off by the size of the logits.
    allowed = float(expected.abs().max()) * (1e-3 if weights.layout.dtype == "float32" else 0.1) + 1e-4
    if not worst <= allowed:
        name = type(weights.net).__name__
        raise UnsupportedModelError(
            f"config field architectures is {name!r}: its layers, called one by one, differ from its own forward by "
            f"{worst:.3g} (allowed {allowed:.3g})"
        )
