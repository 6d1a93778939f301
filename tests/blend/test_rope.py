"""RoPE formulas against transformers' own, and refusal of what is not one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from blend.errors import UnsupportedModelError
from blend.rope import KINDS, check_tables, rope_from_config

THETA = st.sampled_from([10000.0, 500000.0, 1000000.0])
FACTOR = st.floats(1.0, 40.0)
ORIGINAL = st.sampled_from([256, 4096, 8192, 32768])
PARTIAL = st.sampled_from([1.0, 0.5, 0.75])
PARAMETERS = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("linear"), "rope_theta": THETA, "factor": FACTOR}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "rope_theta": THETA,
            "factor": FACTOR,
            "low_freq_factor": st.floats(1.0, 2.0),
            "high_freq_factor": st.floats(3.0, 8.0),
            "original_max_position_embeddings": ORIGINAL,
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "rope_theta": THETA,
            "factor": FACTOR,
            "original_max_position_embeddings": ORIGINAL,
        },
        optional={
            "beta_fast": st.sampled_from([16.0, 32.0]),
            "beta_slow": st.sampled_from([1.0, 2.0]),
            "truncate": st.booleans(),
            "attention_factor": st.floats(0.5, 2.0),
            "mscale": st.sampled_from([0.7, 1.0]),
            "mscale_all_dim": st.sampled_from([0.8, 1.0]),
        },
    ),
)


@settings(max_examples=150)
@given(PARAMETERS, PARTIAL, st.sampled_from([32, 64, 96, 128]))
@pytest.mark.filterwarnings("ignore")
def test_frequencies_equal_those_of_transformers(parameters: dict[str, Any], partial: float, head_dim: int) -> None:
    if parameters["rope_type"] != "linear" or partial != 1.0:
        parameters = parameters | {"partial_rotary_factor": partial}
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=int(parameters.get("original_max_position_embeddings", 2048) * 4),
        rope_parameters=parameters,
    )
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device="cpu")
    ours = rope_from_config(config.to_dict(), head_dim)
    assert ours.kind == parameters["rope_type"]
    torch.testing.assert_close(ours.inv_freq.float(), expected, rtol=1e-5, atol=1e-9)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("old", [True, False])
def test_old_and_new_configs_mean_the_same(old: bool) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = (
        {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
        if old
        else {"rope_parameters": {"rope_theta": 10000.0, **scaling}}
    )
    rope = rope_from_config(config, 64)
    assert (rope.kind, rope.rotary_dim) == ("linear", 64)
    assert float(rope.inv_freq[0]) == 0.5


def test_signatures_tell_ropes_apart() -> None:
    configs = [
        {"rope_theta": 10000.0},
        {"rope_theta": 20000.0},
        {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ]
    assert len({rope_from_config(c, 64).signature for c in configs}) == len(configs)
    assert rope_from_config(configs[0], 64).signature == rope_from_config(dict(configs[0]), 64).signature


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "longrope"),
        ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "proportional"}}, "proportional"),
        ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": None}, "rope_theta"),
        ({}, "rope_theta"),
    ],
)
def test_an_unrecognised_rope_is_refused_by_name(config: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedModelError, match=field):
        rope_from_config(config, 64)


def test_every_kind_is_tested_here() -> None:
    assert set(KINDS) == {"default", "linear", "llama3", "yarn"}


@pytest.mark.parametrize("wrong", ["theta", "factor", "nan", "swapped"])
def test_tables_that_differ_are_refused(wrong: str) -> None:
    rope = rope_from_config({"rope_theta": 10000.0}, 64)
    other = rope_from_config({"rope_theta": 10001.0 if wrong == "theta" else 10000.0}, 64)
    positions = torch.tensor([0, 1, 17, 2047])
    angle = positions[:, None] * other.inv_freq
    cos, sin = angle.cos(), angle.sin()
    if wrong == "factor":
        cos, sin = cos * 1.01, sin * 1.01
    elif wrong == "nan":
        cos[2, 3] = float("nan")
    elif wrong == "swapped":
        cos, sin = sin, cos
    with pytest.raises(UnsupportedModelError, match="rope_type 'default'"):
        check_tables(rope, positions, cos, sin, 1e-4)


def test_a_model_whose_rotary_module_disagrees_with_its_config_does_not_start(
    reference: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    own = LlamaRotaryEmbedding.forward
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", lambda self, x, position_ids: own(self, x, position_ids * 2))
    with pytest.raises(UnsupportedModelError, match="rotary tables differ"):
        reference("llama")


def test_tables_of_another_width_are_refused() -> None:
    rope = rope_from_config({"rope_theta": 10000.0}, 32)
    positions = torch.arange(3)
    narrow = torch.ones(3, 8)
    with pytest.raises(UnsupportedModelError, match="16 dimensions of a head, the config says 32"):
        check_tables(rope, positions, narrow, narrow, 1e-3)
