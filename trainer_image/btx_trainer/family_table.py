"""What the mixer knows of each dense architecture and of the Mixture-of-Experts it becomes: data.

Names on disk, shapes and config fields of transformers 5.23, checked against it by
tests/trainer/test_families.py and test_weights.py. Read by families.py. Pure: no torch, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A stock Mixture-of-Experts architecture."""

    fields: Mapping[str, Any]
    """Config fields that no dense config has, or that have one value here."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Config fields that take the value of a dense field of another name."""
    count: str
    """Config field: how many experts there are."""
    router: str
    """Name of the router, [experts, H], in a layer; without the prefix `model.layers.L.`."""
    experts: Mapping[str, str] = field(default_factory=dict)
    """Tensors of one expert, `{}` its index, each with the part of the dense FFN that it is."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensors [experts, rows, columns], each with the parts that an expert's rows are made of."""
    zeros: Mapping[str, str] = field(default_factory=dict)
    """Names and shapes of a layer's tensors that the dense model lacks and that do nothing as 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One row of the table: everything the mixer knows of a dense architecture.

    A shape is one word per dimension, each a letter or a sum of letters: H hidden, I intermediate,
    V vocabulary, D head, Q all query heads, K all key (or value) heads, S shared expert.
    """

    target: Target
    defaults: Mapping[str, Any]
    """Fields that the target takes under the same name, each with the dense family's default."""
    required: Mapping[str, Any]
    """Fields that the target cannot express, each with the only value that maps; absent is fine."""
    inert: frozenset[str] = frozenset()
    """Fields that change nothing as long as the required ones are what they must be."""
    rope_types: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    """Stock transformers computes these from the config alone, alike for dense model and target."""
    layer: Mapping[str, str]
    """Shapes of a layer's tensors, in order, FFN last, without the prefix `model.layers.L.`."""
    biases: Mapping[str, str] = field(default_factory=dict)
    """Those that are there only if `attention_bias` is true."""
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Fused tensors: the target's name for each term of the sum that is its first dimension."""


ROPE_THETA = 10_000.0
ROPE_FIELDS = frozenset({
    "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "partial_rotary_factor",
})  # fmt: skip

# Fields that describe the file, its history or generation: no logit depends on them.
METADATA = frozenset({
    "_name_or_path", "name_or_path", "_commit_hash", "_attn_implementation_autoset",
    "architectures", "auto_map", "model_type", "transformers_version", "transformers.js_config",
    "unsloth_version", "unsloth_fixed", "is_llama_config", "tokenizer_class", "dtype",
    "torch_dtype", "use_cache", "pretraining_tp", "output_attentions", "output_hidden_states",
    "return_dict", "id2label", "label2id", "num_labels", "problem_type", "max_length",
    "max_new_tokens", "min_length", "do_sample", "num_beams", "temperature", "top_k", "top_p",
    "repetition_penalty", "length_penalty",
})  # fmt: skip

# Taken from the seed; an expert may differ in them, they do not change what its weights mean.
FREE = frozenset({
    "initializer_range", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
})  # fmt: skip

# Of the shared expert that Qwen2-MoE cannot do without: it computes 0, and its gradient is 0. A
# multiple of 64 can be cut for tensor parallelism; at 0 vLLM would not know its tensors.
SHARED_WIDTH = 64

_GATED_SILU: Mapping[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "is_encoder_decoder": False,
}
_NO_BIAS: Mapping[str, Any] = {**_GATED_SILU, "attention_bias": False}
_LLAMA_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN_DEFAULTS: Mapping[str, Any] = {
    **_LLAMA_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
_ATTENTION: Mapping[str, str] = {
    "self_attn.q_proj.weight": "Q H",
    "self_attn.k_proj.weight": "K H",
    "self_attn.v_proj.weight": "K H",
    "self_attn.o_proj.weight": "H Q",
}
_QKV_BIASES: Mapping[str, str] = {
    "self_attn.q_proj.bias": "Q",
    "self_attn.k_proj.bias": "K",
    "self_attn.v_proj.bias": "K",
}
_BIASES: Mapping[str, str] = {**_QKV_BIASES, "self_attn.o_proj.bias": "H"}
_FFN: Mapping[str, str] = {
    "mlp.gate_proj.weight": "I H",
    "mlp.up_proj.weight": "I H",
    "mlp.down_proj.weight": "H I",
}
_LLAMA_LAYER: Mapping[str, str] = {
    "input_layernorm.weight": "H",
    **_ATTENTION,
    "post_attention_layernorm.weight": "H",
    **_FFN,
}

# The disk names: transformers fuses them on loading, the native classes of vLLM know no others.
_MIXTRAL = Target(
    fields={
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "use_cache": True,
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    },
    count="num_local_experts",
    router="block_sparse_moe.gate.weight",
    experts={
        "block_sparse_moe.experts.{}.w1.weight": "mlp.gate_proj.weight",
        "block_sparse_moe.experts.{}.w2.weight": "mlp.down_proj.weight",
        "block_sparse_moe.experts.{}.w3.weight": "mlp.up_proj.weight",
    },
)
_PER_EXPERT: Mapping[str, str] = {
    "mlp.experts.{}.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.experts.{}.up_proj.weight": "mlp.up_proj.weight",
    "mlp.experts.{}.down_proj.weight": "mlp.down_proj.weight",
}
_QWEN_FIELDS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "use_cache": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "output_router_logits": False,
}
_QWEN3_MOE = Target(
    fields={
        **_QWEN_FIELDS,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
    },
    renamed={"moe_intermediate_size": "intermediate_size"},
    count="num_experts",
    router="mlp.gate.weight",
    experts=_PER_EXPERT,
)
_QWEN2_MOE = Target(
    fields={
        **_QWEN_FIELDS,
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "qkv_bias": True,
        "max_window_layers": 28,
        "layer_types": None,
        "shared_expert_intermediate_size": SHARED_WIDTH,
    },
    renamed={"moe_intermediate_size": "intermediate_size"},
    count="num_experts",
    router="mlp.gate.weight",
    experts=_PER_EXPERT,
    zeros={
        "mlp.shared_expert.gate_proj.weight": "S H",
        "mlp.shared_expert.up_proj.weight": "S H",
        "mlp.shared_expert.down_proj.weight": "H S",
        "mlp.shared_expert_gate.weight": "1 H",
    },
)
_FLEX_OLMO = Target(
    fields={
        "architectures": ["FlexOlmoForCausalLM"],
        "model_type": "flex_olmo",
        "hidden_act": "silu",
        "use_cache": True,
        # Without it the norm behind the FFN still hides the scale, but for its epsilon.
        "norm_topk_prob": True,
        "output_router_logits": False,
    },
    count="num_experts",
    router="mlp.gate.weight",
    experts=_PER_EXPERT,
)
_GRANITE_MOE = Target(
    fields={
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        "hidden_act": "silu",
        "use_cache": True,
        "output_router_logits": False,
    },
    count="num_local_experts",
    router="block_sparse_moe.router.layer.weight",
    fused={
        "block_sparse_moe.input_linear.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "block_sparse_moe.output_linear.weight": ("mlp.down_proj.weight",),
    },
)

# Layers that slide and layers that do not cannot both be said of the targets.
_QWEN_REQUIRED: Mapping[str, Any] = {
    **_GATED_SILU, "use_sliding_window": False, "use_mrope": False,
}  # fmt: skip
_QWEN_INERT = frozenset({"sliding_window", "max_window_layers", "layer_types"})

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        target=_MIXTRAL, defaults=_LLAMA_DEFAULTS, required=_NO_BIAS, layer=_LLAMA_LAYER
    ),
    "mistral": Family(
        target=_MIXTRAL,
        defaults={
            **_LLAMA_DEFAULTS,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        required=_NO_BIAS,
        layer=_LLAMA_LAYER,
    ),
    "phi3": Family(
        target=_MIXTRAL,
        defaults={
            **_LLAMA_DEFAULTS,
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 32000,
            "eos_token_id": 32000,
            "sliding_window": None,
        },
        required={**_NO_BIAS, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        # Read by longrope alone.
        inert=frozenset({"original_max_position_embeddings"}),
        # Stock Phi-3 reads any other as longrope, and starts its cache afresh where that switches.
        rope_types=("default",),
        layer={
            "input_layernorm.weight": "H",
            "self_attn.qkv_proj.weight": "Q+K+K H",
            "self_attn.o_proj.weight": "H Q",
            "post_attention_layernorm.weight": "H",
            "mlp.gate_up_proj.weight": "I+I H",
            "mlp.down_proj.weight": "H I",
        },
        parts={
            "self_attn.qkv_proj.weight": tuple(_ATTENTION)[:3],
            "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        },
    ),
    "qwen3": Family(
        target=_QWEN3_MOE,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False},
        required=_QWEN_REQUIRED,
        inert=_QWEN_INERT,
        layer={
            "input_layernorm.weight": "H",
            **_ATTENTION,
            "self_attn.q_norm.weight": "D",
            "self_attn.k_norm.weight": "D",
            "post_attention_layernorm.weight": "H",
            **_FFN,
        },
        biases=_BIASES,
    ),
    "qwen2": Family(
        target=_QWEN2_MOE,
        defaults=_QWEN_DEFAULTS,
        required=_QWEN_REQUIRED,
        inert=_QWEN_INERT,
        layer={
            "input_layernorm.weight": "H",
            **_ATTENTION,
            **_QKV_BIASES,
            "post_attention_layernorm.weight": "H",
            **_FFN,
        },
    ),
    "olmo2": Family(
        target=_FLEX_OLMO,
        defaults={
            **_LLAMA_DEFAULTS,
            "vocab_size": 50304,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 1,
            "bos_token_id": None,
            "eos_token_id": 50279,
            "attention_bias": False,
        },
        required=_GATED_SILU,
        layer={
            **_ATTENTION,
            "self_attn.q_norm.weight": "Q",
            "self_attn.k_norm.weight": "K",
            "post_attention_layernorm.weight": "H",
            "post_feedforward_layernorm.weight": "H",
            **_FFN,
        },
        biases=_BIASES,
    ),
    "granite": Family(
        target=_GRANITE_MOE,
        defaults={
            **_LLAMA_DEFAULTS,
            "attention_bias": False,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
        required=_GATED_SILU,
        layer=_LLAMA_LAYER,
        biases=_BIASES,
    ),
}
